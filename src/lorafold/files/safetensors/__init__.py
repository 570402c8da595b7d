"""One .safetensors file: its header read strictly, its tensors read and written by position, never mapped, never held whole."""
