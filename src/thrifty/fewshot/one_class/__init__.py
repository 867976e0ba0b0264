"""One-class decisions from a label alone: is it this, when all that is known of it is its name?"""

from thrifty.fewshot.one_class.answers import EXAMPLES, PROMPT, AnswerFile, Source, collect
from thrifty.fewshot.one_class.benchmark import (
    Benchmark,
    Question,
    build,
    embed,
    split,
    units_above,
    units_of_size,
)
from thrifty.fewshot.one_class.calibration import Calibration, calibrate, probability_scale
from thrifty.fewshot.one_class.encoders import ClipFolder, TextMap, prompts, read_texts, write_texts
from thrifty.fewshot.one_class.endpoint import ChatEndpoint
from thrifty.fewshot.one_class.estimator import OneClass
from thrifty.fewshot.one_class.evaluation import EmbeddedTask, Evaluation, check_disjoint, evaluate
from thrifty.fewshot.one_class.local_model import LocalModel
from thrifty.fewshot.one_class.metrics import auroc, balanced_accuracy, best_threshold, grouped_interval, macro_f1
from thrifty.fewshot.one_class.negatives import (
    Negatives,
    clean,
    drop_same,
    parse_answer,
    random_names,
    wordnet_negatives,
)
from thrifty.fewshot.one_class.rules import RULES
from thrifty.fewshot.one_class.taxonomy import Taxonomy
from thrifty.fewshot.one_class.toy import ToyWorld
from thrifty.fewshot.one_class.wordnet import Synset, WordNet

__all__ = [
    "EXAMPLES",
    "PROMPT",
    "RULES",
    "AnswerFile",
    "Benchmark",
    "Calibration",
    "ChatEndpoint",
    "ClipFolder",
    "EmbeddedTask",
    "Evaluation",
    "LocalModel",
    "Negatives",
    "OneClass",
    "Question",
    "Source",
    "Synset",
    "Taxonomy",
    "TextMap",
    "ToyWorld",
    "WordNet",
    "auroc",
    "balanced_accuracy",
    "best_threshold",
    "build",
    "calibrate",
    "check_disjoint",
    "clean",
    "collect",
    "drop_same",
    "embed",
    "evaluate",
    "grouped_interval",
    "macro_f1",
    "parse_answer",
    "probability_scale",
    "prompts",
    "random_names",
    "read_texts",
    "split",
    "units_above",
    "units_of_size",
    "wordnet_negatives",
    "write_texts",
]
