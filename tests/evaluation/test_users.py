"""Who is served worst, who is like whom, and where each user lies in the plane of the most variance."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prlhf.cli import main
from prlhf.errors import DataError
from prlhf.evaluation.users import compute_user_map, format_users, load_users, nearest_users
from tests.evaluation.test_report import final_of
from tests.saved_policies import STEP, USER_IDS, save_policy

ANN, BOB, CAT = USER_IDS


def evaluated(run_dir: Path, accuracies: dict[str, float], *, step: int = STEP) -> None:
    (run_dir / "eval").mkdir()
    per_user = {u: {"accuracy": a, "generic_accuracy": 0.25, "num_rows": 4} for u, a in accuracies.items()}
    (run_dir / "eval" / "final.json").write_text(json.dumps(final_of(step=step, per_user=per_user)))


def test_the_worst_served_user_comes_first_and_the_unevaluated_last(tmp_path: Path) -> None:
    save_policy(tmp_path / "run")
    evaluated(tmp_path / "run", {ANN: 0.75, CAT: 0.5})
    _, users = load_users(tmp_path / "run")
    assert [user.user_id for user in users] == [CAT, ANN, BOB]
    assert [line.split() for line in format_users(users).splitlines()] == [
        ["user", "accuracy", "as", "generic", "rows"],
        [CAT, "0.500", "0.250", "4"],
        [ANN, "0.750", "0.250", "4"],
        [BOB],
    ]


def test_figures_of_another_step_are_not_shown(tmp_path: Path) -> None:
    save_policy(tmp_path / "run")
    evaluated(tmp_path / "run", {ANN: 0.75}, step=STEP + 1)
    _, users = load_users(tmp_path / "run")
    assert [(user.user_id, user.accuracy) for user in users] == [(user, None) for user in USER_IDS]


def test_clusters_are_those_with_the_largest_share(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "run", user_kind="cluster")
    _, users = load_users(tmp_path / "run")
    for user, logits in zip(users, policy.user_encoder.weights[1:].tolist(), strict=True):
        largest = max(logits)
        assert user.cluster == logits.index(largest)
        assert user.share == pytest.approx(math.exp(largest) / sum(map(math.exp, logits)))


def test_nearest_users_are_ordered_by_the_distance_of_their_soft_prompts(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "run")
    offsets = policy.user_encoder.offsets.detach().double().flatten(1)
    distances = {USER_IDS[i]: float((offsets[i] - offsets[1]).norm()) for i in (0, 2)}
    found = nearest_users(load_users(tmp_path / "run")[0], BOB)
    assert [other.user_id for other in found] == sorted(distances, key=lambda user: distances[user])
    for other in found:
        place = USER_IDS.index(other.user_id)
        cosine = offsets[place] @ offsets[1] / (offsets[place].norm() * offsets[1].norm())
        assert (other.distance, other.cosine) == pytest.approx((distances[other.user_id], float(cosine)), abs=1e-5)
    with pytest.raises(DataError, match="not one of the 3 known users"):
        nearest_users(policy, "dan")


def test_the_map_keeps_what_lies_in_a_plane():
    """Soft prompts made of two orthogonal directions: distances in the map are those of the prompts."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(12, 2, generator=generator)).Q.T
    places = torch.tensor([[0.0, 0.0], [3.0, 0.0], [-3.0, 0.5], [1.0, -0.5], [-1.0, 0.0]])
    found = compute_user_map((places @ plane + 7).view(5, 3, 4))
    expected = torch.cdist(places[1:], places[1:]).double()
    assert torch.allclose(torch.cdist(found.users, found.users), expected, atol=1e-5)
    assert torch.allclose((found.users - found.generic).norm(dim=1), places[1:].norm(dim=1).double(), atol=1e-5)
    centred = places[1:] - places[1:].mean(dim=0)
    sizes = torch.linalg.svdvals(centred).square()
    assert found.explained == pytest.approx((sizes / sizes.sum()).tolist(), abs=1e-5)


@pytest.mark.parametrize("num_users", [1, 2])
def test_a_map_of_one_or_two_users_is_a_point_or_a_line(num_users: int) -> None:
    found = compute_user_map(torch.arange(float((1 + num_users) * 4)).view(1 + num_users, 2, 2))
    assert found.users.shape == (num_users, 2) and found.users.isfinite().all()
    assert found.explained[0] == pytest.approx(1.0 if num_users == 2 else 0.0)


@pytest.mark.parametrize(("kind", "colour"), [("cluster", None), ("cluster", "accuracy"), ("individual", None)])
def test_the_command_draws_a_map(kind: str, colour: str | None, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    save_policy(tmp_path / "run", user_kind=kind)
    evaluated(tmp_path / "run", {ANN: 0.75, BOB: 0.5})
    picture = tmp_path / "map.png"
    options = [] if colour is None else ["--colour", colour]
    assert main(["users", str(tmp_path / "run"), "--map", str(picture), *options]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{picture}\n"


def test_the_command_lists_and_refuses(tmp_path: Path, capsys: Any) -> None:
    save_policy(tmp_path / "run")
    save_policy(tmp_path / "none", user_kind="none")
    assert main(["users", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[0].strip() == "user"
    assert main(["users", str(tmp_path / "run"), "--nearest", ANN]) == 0
    assert capsys.readouterr().out.startswith("nearest to ann:\n")
    assert main(["users", str(tmp_path / "none")]) == 2
    assert "this model has no users" in capsys.readouterr().err


def test_a_map_by_clusters_needs_clusters(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    save_policy(tmp_path / "run")
    assert main(["users", str(tmp_path / "run"), "--map", str(tmp_path / "m.png"), "--colour", "cluster"]) == 2
    assert "are in no clusters" in capsys.readouterr().err
