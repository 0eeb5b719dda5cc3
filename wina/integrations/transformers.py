"""``from_pretrained`` gives sparse models: a quantization method ``wina`` of transformers.

Importing this module registers it through transformers' own plug-in points. ``import wina`` sees to
that as soon as transformers itself has been imported, and not before.

>>> model = AutoModelForCausalLM.from_pretrained(
...     path, quantization_config=wina.WinaConfig(sparsity=0.5)
... )  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from wina.api import sparsify
from wina.config import SparsityConfig
from wina.errors import CalibrationError
from wina.plan import SparsityPlan
from wina.plan_file import JSON_FILE, TENSOR_FILE
from wina.saving import PLAN_FOLDER, QUANT_METHOD


@register_quantization_config(QUANT_METHOD)
class WinaConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``from_pretrained`` takes as ``quantization_config``.

    A plan in the folder that was made with the same settings is used; otherwise the model is
    calibrated once its weights are there.

    Args:
        texts: calibration texts, strings or token ids; the bundled text by default.
        tokenizer: the model's; the one in its folder by default.
        backend: ``"auto"`` or the name of a kernel backend.
        keep_original: see :func:`wina.sparsify`.
        show_progress: draw progress bars on stderr.
        **settings: fields of :class:`wina.SparsityConfig`; the only part that is saved.

    Raises:
        wina.errors.WinaError: a setting does not fit.
    """

    def __init__(
        self,
        *,
        texts: Sequence[str] | Sequence[Tensor] | Tensor | None = None,
        tokenizer: Any | None = None,
        backend: str = "auto",
        keep_original: bool = False,
        show_progress: bool = True,
        quant_method: str = QUANT_METHOD,
        **settings: Any,
    ) -> None:
        self.quant_method = quant_method
        self.sparsity = SparsityConfig.from_dict(settings)
        self.texts = texts
        self.tokenizer = tokenizer
        self.backend = backend
        self.keep_original = keep_original
        self.show_progress = show_progress

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` keeps, JSON-ready."""
        return {"quant_method": self.quant_method, **self.sparsity.to_dict()}


@register_quantizer(QUANT_METHOD)
class WinaQuantizer(HfQuantizer):  # type: ignore[misc]
    """Patches a model when its weights have been loaded.

    Afterwards the model is what :func:`wina.sparsify` makes of it, and no longer counts as
    quantized: its weights are all there, so it can be cast, moved, tuned and saved.
    """

    quantization_config: WinaConfig
    is_trainable = True
    is_compileable = True

    def is_serializable(self, **_: Any) -> bool:
        """Yes: see :mod:`wina.saving`."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> Any:
        self.weights = Path(checkpoint_files[0]).parent if checkpoint_files else None
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self.remove_quantization_config(model)
        asked = self.quantization_config
        plan = self._saved_plan(model)
        if plan is not None and not self.pre_quantized:
            plan = plan if plan.config.record() == asked.sparsity.record() else None
        tokenizer = asked.tokenizer
        if plan is None and tokenizer is None and _is_text(asked.texts):
            tokenizer = _tokenizer_of(model)
        sparsify(
            model,
            asked.sparsity if plan is None else plan,
            tokenizer=tokenizer,
            texts=asked.texts,
            backend=asked.backend,
            keep_original=asked.keep_original,
            show_progress=asked.show_progress,
        )
        return model

    def _saved_plan(self, model: Any) -> SparsityPlan | None:
        """The plan beside the weights: in their folder, or in the repository they come from."""
        if self.weights is not None and (self.weights / PLAN_FOLDER / JSON_FILE).is_file():
            return SparsityPlan.load(self.weights / PLAN_FOLDER)
        source = model.config.name_or_path
        if not source or Path(source).exists():
            return None
        from transformers.utils import cached_file

        found = [
            cached_file(
                source,
                f"{PLAN_FOLDER}/{file}",
                revision=getattr(model.config, "_commit_hash", None),
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            for file in (JSON_FILE, TENSOR_FILE)
        ]
        return None if None in found else SparsityPlan.load(Path(found[0]).parent)


def _is_text(texts: Sequence[str] | Sequence[Tensor] | Tensor | None) -> bool:
    """Whether calibration needs a tokenizer."""
    return not isinstance(texts, Tensor) and (
        texts is None or any(isinstance(text, str) for text in texts)
    )


def _tokenizer_of(model: Any) -> Any:
    from transformers import AutoTokenizer

    source = model.config.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=getattr(model.config, "_commit_hash", None) or "main"
        )
        # transformers 5.0 makes an empty one where there are no files.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("its vocabulary is empty")
        return tokenizer
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"calibration needs a tokenizer, and {source or 'the model'} has none ({error}): pass "
            "WinaConfig(tokenizer=...), or texts= as token ids"
        ) from None
