from pathlib import Path

Path("canary").write_text("own code ran")


class OwnTokenizer:
    pass
