"""Feature distillation: what a layer of the student gives against what a layer of the teacher gives.

`terms` is what a trainer holds, `hooks` reads the layers, `contrastive` and `information` hold the methods.
"""

from abkd.features.contrastive import CRD
from abkd.features.hooks import FeatureHook
from abkd.features.information import ITRD
from abkd.features.losses import FeatureLoss, FeatureMethod
from abkd.features.terms import AttachedTerm, FeatureTerm

METHODS: dict[str, type[FeatureMethod]] = {method.kind: method for method in (CRD, ITRD)}
"""Name in recipes -> class."""

__all__ = ["CRD", "ITRD", "METHODS", "AttachedTerm", "FeatureHook", "FeatureLoss", "FeatureMethod", "FeatureTerm"]
