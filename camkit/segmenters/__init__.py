"""Promptable segmenters, such as the SAM family, and the prompts made from class maps."""

from camkit.segmenters.adapters import (
    AskSegmenter as AskSegmenter,
    CallableSegmenter as CallableSegmenter,
    as_segmenter as as_segmenter,
)
from camkit.segmenters.hugging_face import TransformersSegmenter as TransformersSegmenter
from camkit.segmenters.parts import Part as Part
from camkit.segmenters.predictors import (
    SAM2PredictorSegmenter as SAM2PredictorSegmenter,
    SamPredictorSegmenter as SamPredictorSegmenter,
)
from camkit.segmenters.pretrained import PretrainedSegmenter as PretrainedSegmenter
from camkit.segmenters.protocol import (
    Answers as Answers,
    Prompt as Prompt,
    Segmenter as Segmenter,
)
from camkit.segmenters.rules import (
    Peaks as Peaks,
    PromptRule as PromptRule,
    SamRefinerPrompts as SamRefinerPrompts,
)
