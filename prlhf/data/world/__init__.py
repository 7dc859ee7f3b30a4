"""The built-in world: authored topics and phrases, and the data sets made from them."""
