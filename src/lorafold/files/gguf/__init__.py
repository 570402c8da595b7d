"""GGUF, llama.cpp's container: reading and laying out its header; its tensors are read and written as those of safetensors are."""
