"""What cupel writes and reads: networks as plain data, tensors in safetensors files. Nothing is pickled."""
