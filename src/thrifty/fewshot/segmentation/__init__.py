"""Few-shot segmentation: adapt a pretrained encoder to classes of one's own from k labelled pictures of each."""

from thrifty.fewshot.segmentation.adapting import Fitting, adapt, choose_rate
from thrifty.fewshot.segmentation.augment import Augment
from thrifty.fewshot.segmentation.cityscapes import CITYSCAPES_REDUCED, Cityscapes
from thrifty.fewshot.segmentation.coco import Coco
from thrifty.fewshot.segmentation.confusion import Confusion
from thrifty.fewshot.segmentation.efficientnet import EfficientNetLite0
from thrifty.fewshot.segmentation.encoder import Encoder, fingerprint, tokens_to_map
from thrifty.fewshot.segmentation.huggingface import FAMILIES, from_folder, wrap
from thrifty.fewshot.segmentation.lora import apply_lora, merge_lora
from thrifty.fewshot.segmentation.methods import METHODS, FineTune, Linear, Lora, Method, Multilayer, Svf, trainable
from thrifty.fewshot.segmentation.pictures import IGNORE, InMemory, LabelledPictures, presence
from thrifty.fewshot.segmentation.ppd import Ppd
from thrifty.fewshot.segmentation.scenes import SCENE_CLASSES, Scenes
from thrifty.fewshot.segmentation.segmenter import Head, Segmenter, evaluate
from thrifty.fewshot.segmentation.support import Item, Support, sample, sample_centres, sample_pictures
from thrifty.fewshot.segmentation.svf import apply_svf, merge_svf

__all__ = [
    "CITYSCAPES_REDUCED",
    "FAMILIES",
    "IGNORE",
    "METHODS",
    "SCENE_CLASSES",
    "Augment",
    "Cityscapes",
    "Coco",
    "Confusion",
    "EfficientNetLite0",
    "Encoder",
    "FineTune",
    "Fitting",
    "Head",
    "InMemory",
    "Item",
    "LabelledPictures",
    "Linear",
    "Lora",
    "Method",
    "Multilayer",
    "Ppd",
    "Scenes",
    "Segmenter",
    "Support",
    "Svf",
    "adapt",
    "apply_lora",
    "apply_svf",
    "choose_rate",
    "evaluate",
    "fingerprint",
    "from_folder",
    "merge_lora",
    "merge_svf",
    "presence",
    "sample",
    "sample_centres",
    "sample_pictures",
    "tokens_to_map",
    "trainable",
    "wrap",
]
