"""A trained model as a pipeline of diffusers is used, in one process."""

from megadit.pipeline.pipeline import ECDiTPipeline, PipelineOutput

__all__ = ["ECDiTPipeline", "PipelineOutput"]
