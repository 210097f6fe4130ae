"""The layouts that parity is shown on: world size and overrides by name."""

CONFIG = "tests/configs/tiny.yaml"
LAYOUTS = {
    "tensor2": (2, ["parallel.tensor=2"]),
    "pipeline2": (2, ["parallel.pipeline=2"]),
    "expert2": (2, ["parallel.expert=2"]),
    "data2": (2, []),
    "data4": (4, []),
    "expert2_data2": (4, ["parallel.expert=2"]),
    "tensor2_expert2": (4, ["parallel.tensor=2", "parallel.expert=2"]),
    "pipeline2_expert2": (4, ["parallel.pipeline=2", "parallel.expert=2"]),
    "tensor2_pipeline2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "tensor2_sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "tensor2_expert2_sequence": (4, ["parallel.tensor=2", "parallel.expert=2", "parallel.sequence=true"]),
    "tensor2_expert2_recompute": (4, ["parallel.tensor=2", "parallel.expert=2", "run.recompute=block"]),
    "pipeline2_expert2_recompute": (4, ["parallel.pipeline=2", "parallel.expert=2", "run.recompute=block"]),
    "tensor2_pipeline2_sequence": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
}
