"""The methods by name."""

from nbkit.errors import MethodError
from nbkit.methods.finetune import FinetuneParameters, finetune_each, finetune_together
from nbkit.methods.knowledge_neurons import KnowledgeNeuronParameters, knowledge_neurons_each
from nbkit.methods.memit import MemitParameters, keys_to_spare, memit_each, memit_together
from nbkit.methods.mend import MendParameters, mend_each, mend_files, mend_together
from nbkit.methods.method import Method
from nbkit.methods.rome import RomeParameters, rome
from nbkit.methods.ultraedit import UltraEditParameters, pairs_so_far, ultraedit_each, ultraedit_together
from nbkit.records.bounds import nearest

METHODS: dict[str, Method] = {
    "ft": Method(FinetuneParameters, finetune_each, finetune_together),
    "kn": Method(KnowledgeNeuronParameters, knowledge_neurons_each),
    "mend": Method(MendParameters, mend_each, mend_together, files=mend_files),
    "rome": Method(
        RomeParameters, rome, takes_second_moment=True, template_lengths=((5, 10), (10, 10)), plain_template=False
    ),
    **{
        name: Method(
            MemitParameters, memit_each, memit_together, takes_second_moment=True, needs_second_moment=True,
            template_lengths=((10, 5),), remembers=keys_to_spare,
        )  # fmt: skip
        for name in ("memit", "emmet", "alphaedit", "encore")
    },
    "ultraedit": Method(UltraEditParameters, ultraedit_each, ultraedit_together, remembers=pairs_so_far),
    "locft-bf": Method(FinetuneParameters, finetune_each, finetune_together),
}


def method_named(name: str) -> Method:
    if not isinstance(name, str) or name not in METHODS:
        raise MethodError(f"unknown method {name!r}; known: {', '.join(METHODS)}{nearest(name, list(METHODS))}")
    return METHODS[name]
