"""How stored tensors stand for the numbers of a weight: a file for each family of formats, `registry.py` lists them."""
