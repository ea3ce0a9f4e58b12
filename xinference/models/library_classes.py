# SPDX-License-Identifier: Apache-2.0
"""What `transformers` has for a type of model, by the tables that its own auto classes use.

Asked before a model is downloaded; loading it asks again. Needs no torch.
"""

import logging
from collections.abc import Mapping

from xinference.protocol.repositories import CAUSAL, CLASSIFIER, ENCODER

logger = logging.getLogger(__name__)


def classes_of(model_type: str) -> dict[str, tuple[str, ...]] | None:
    """Return the names of the classes for a `model_type` of a `config.json`, by what they do.

    None if this version of the library does not say.
    """
    try:
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            MODEL_MAPPING_NAMES,
        )
    except ImportError as error:
        # Why not raised: without the tables the launch goes on, and loading says what is wrong.
        logger.warning("The classes of transformers are not known: %s", error)
        return None
    tables: dict[str, Mapping[str, object]] = {
        CAUSAL: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        ENCODER: MODEL_MAPPING_NAMES,
        CLASSIFIER: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    return {use: _names(table.get(model_type)) for use, table in tables.items()}


def _names(found: object) -> tuple[str, ...]:
    if found is None:
        return ()
    return tuple(map(str, found)) if isinstance(found, tuple | list) else (str(found),)
