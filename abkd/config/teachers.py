"""Who gives a language model's targets."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from abkd.config.fields import Count, NonNegative, Positive, Section

Tail = Literal["lump", "uniform", "renormalise"]


class InProcess(Section):
    """A frozen model beside the student."""

    kind: Literal["in_process"] = "in_process"
    path: str
    """A model folder, a .gguf file or its folder, package:NAME, or a hub id owner/name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    adapter: str = ""
    """The folder or hub id of a LoRA adapter for this model, merged into it when it is loaded."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """The weights of its linear layers in 8 or 4 bits, by bitsandbytes; the rest, and what is computed, in dtype."""
    remember: bool = False
    """Keep each example's last hidden states in main memory: the teacher runs once per example, not once per epoch."""

    @model_validator(mode="after")
    def _whole_weights_to_merge_into(self):
        if self.adapter and self.quantization != "none":
            raise ValueError(
                f"adapter={self.adapter!r} cannot be merged into weights of quantization={self.quantization}; "
                "set quantization=none, or give a merged model (student.lora.merge=true writes one)"
            )
        return self


class Cached(Section):
    """What `abkd cache` wrote; the teacher itself is not loaded."""

    kind: Literal["cached"]
    path: str = Field(min_length=1)
    """The cache's folder."""
    tail: Tail | None = None
    """What is made of the classes that top-k targets leave out, see docs/teachers.md. Only for those, which need it."""


def _plain_url(url: str) -> str:
    """The value is not repeated: a password may be in it."""
    if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", url):
        raise ValueError(
            "is no http://HOST:PORT without user and password; a key for the server is read from the environment "
            "variable ABKD_API_KEY"
        )
    return url


class Served(Section):
    """A model behind an HTTP server that gives log-probabilities of prompts; an API key is read from ABKD_API_KEY."""

    kind: Literal["served"]
    url: Annotated[str, AfterValidator(_plain_url)]
    """Of the server, as http://127.0.0.1:8000. Without a user or password."""
    model: str = Field(min_length=1)
    """Its name there."""
    tokenizer: str = ""
    """Folder or hub id of the model's tokenizer; empty takes the student's. Compared with the server's."""
    k: Count = 20
    """Classes of each token that are asked for; many servers allow 20 unless told otherwise."""
    tail: Tail
    """What is made of the rest, see docs/teachers.md."""
    api: Literal["auto", "vllm", "sglang", "llama_cpp"] = "auto"
    """How the server is asked; auto finds out."""
    num_connections: Count = 8
    """Requests under way at most."""
    timeout_s: Positive = 120.0
    """For one answer."""
    patience_s: NonNegative = 300.0
    """How long a server that does not answer is asked again, before the training stops, to be resumed."""


HOW_ASKED = {"url", "api", "num_connections", "timeout_s", "patience_s"}
"""Fields of a served teacher that change nothing of what it says."""


def _kind(section: object) -> object:
    """In a section of several kinds, which one it is; in_process where it says none."""
    return section.get("kind", "in_process") if isinstance(section, dict) else getattr(section, "kind", None)


OneTeacher = Annotated[
    Annotated[InProcess, Tag("in_process")] | Annotated[Cached, Tag("cached")] | Annotated[Served, Tag("served")],
    Discriminator(_kind),
]


class Mixture(Section):
    """Several teachers of one vocabulary; the target is the weighted mean of their distributions."""

    kind: Literal["mixture"]
    teachers: tuple[OneTeacher, ...]
    """Each as a teacher alone; of top-k targets tail is uniform or renormalise."""
    weights: tuple[Positive, ...] = ()
    """One for each teacher, made to add up to 1; empty is the same for all."""

    @model_validator(mode="after")
    def _a_weight_each(self):
        if len(self.teachers) < 2:
            raise ValueError(f"teachers has {len(self.teachers)} of them, and a mixture needs 2 or more")
        if self.weights and len(self.weights) != len(self.teachers):
            raise ValueError(
                f"weights has {len(self.weights)} numbers for {len(self.teachers)} teachers; give one for each"
            )
        for each in self.teachers:
            if getattr(each, "tail", None) == "lump":
                raise ValueError(
                    "tail=lump has no row to mix; set tail=uniform or tail=renormalise for the teachers of a mixture"
                )
        return self


Teacher = Annotated[
    Annotated[InProcess, Tag("in_process")]
    | Annotated[Cached, Tag("cached")]
    | Annotated[Served, Tag("served")]
    | Annotated[Mixture, Tag("mixture")],
    Discriminator(_kind),
]
