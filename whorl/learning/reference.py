"""The reference policy: what the policy was at one moment, kept frozen."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from whorl.model.lora import adapters_off, policy_parameters
from whorl.model.transformer import Transformer


class Reference:
    """The policy of `model` as it is when this is made.

    Of a model with adapters only those are copied: the base is the same, and never changes.
    """

    def __init__(self, model: Transformer):
        self._policy = model
        self._whole: Transformer | None = None
        self._adapters: dict[str, Tensor] = {}
        if model.lora is None:
            self._whole = copy.deepcopy(model).requires_grad_(False)
        else:
            self._adapters = {name: p.detach().clone() for name, p in policy_parameters(model).items()}

    def tensors(self) -> dict[str, Tensor]:
        """What has to be kept of it, by name: the live tensors."""
        return self._adapters if self._whole is None else dict(policy_parameters(self._whole))

    @contextmanager
    def model(self) -> Iterator[Transformer]:
        """A model that is the reference policy within this context; with adapters, the policy's own model."""
        if self._whole is not None:
            yield self._whole
        elif not any(bool(tensor.any()) for name, tensor in self._adapters.items() if name.endswith(".B")):
            with adapters_off(self._policy):
                yield self._policy
        else:
            live = policy_parameters(self._policy)
            present = {name: p.data for name, p in live.items()}
            try:
                for name, p in live.items():
                    p.data = self._adapters[name]
                yield self._policy
            finally:
                for name, p in live.items():
                    p.data = present[name]
