"""Files, whatever is in them: one .safetensors file, outputs that appear whole or not at all, strict JSON, paths of strangers."""
