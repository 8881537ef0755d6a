"""ONNX files for ONNX Runtime: static, dynamic and weight-only; or in TensorRT's dialect."""

from qkit.targets.onnx.backend import BACKEND as BACKEND
