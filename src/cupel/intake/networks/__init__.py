"""Readers of the user's networks: code, programs of torch.export, ONNX files."""
