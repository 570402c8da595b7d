"""The one function that adds a ΔW to a weight, in torch, C (`cpu`) and CUDA (`cuda`), and what restores the weight (`undo`)."""
