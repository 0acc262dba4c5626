"""The recipe of a language model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from abkd.config.fields import Count, CountOrZero, NonNegative, Positive, Recipe, Section
from abkd.config.objective import Objective
from abkd.config.teachers import Cached, InProcess, Mixture, Served, Teacher
from abkd.config.training import Training


class LoRA(Section):
    """Trains low-rank updates of some layers, all else fixed (peft)."""

    rank: Count = 16
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the update's inputs dropped in training."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Names of the layers, as [q_proj, v_proj]; all-linear is every one but the output head."""
    merge: bool = True
    """The run's student has the updates in its weights; false writes the adapter alone."""


class Pretrained(Section):
    """An existing checkpoint."""

    kind: Literal["pretrained"]
    path: str
    """As teacher.path."""
    adapter: str = ""
    """As teacher.adapter."""
    lora: LoRA | None = None
    """None trains every weight."""
    freeze_embeddings: bool = False
    """Keep token embeddings and output head as they are; a step is cheaper, by a third for a small model."""


class Shrink(Section):
    """The teacher, or another model, with some of its layers. Either keep_layers or layers says which."""

    kind: Literal["shrink"]
    path: str = ""
    """The model that is shrunk, as teacher.path; empty is the teacher."""
    keep_layers: CountOrZero = 0
    """How many, evenly spaced, first and last included."""
    layers: tuple[CountOrZero, ...] = ()
    """Their numbers, rising, the teacher's first is 0."""
    lora: LoRA | None = None
    """None trains every weight."""
    freeze_embeddings: bool = False
    """As for a pretrained student. The embeddings are the teacher's own."""

    @model_validator(mode="after")
    def _which_layers(self):
        if self.lora and not self.lora.merge:
            raise ValueError("lora.merge=false would write an adapter for a student that is nowhere saved; set it true")
        if bool(self.keep_layers) == bool(self.layers):
            found = "both are set" if self.layers else "neither is"
            raise ValueError(f"set exactly one of keep_layers (above 0) and layers, {found}")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers={list(self.layers)} must rise, each number once")
        return self


Student = Annotated[Pretrained | Shrink, Field(discriminator="kind")]


class Data(Section):
    train: str = Field(min_length=1)
    """Instructions: a file (.jsonl, .jsonl.gz, .parquet, .arrow), a folder of such or of datasets.save_to_disk, the hub
    id owner/name of a data set; package:NAME/PATH for a file inside a package."""
    subset: str = ""
    """Of a hub's data set that has several."""
    split: str = "train"
    """Of train, where it is a hub's or a saved data set with splits."""
    validation_split: str = "validation"
    """Of validation, likewise; validation may name the same data set as train."""
    stream: bool = False
    """Read the first max_train_rows and max_validation_rows rows of a hub's data sets as they come, without downloading
    the rest."""
    validation: str = ""
    """Another; empty holds out num_held_out rows of train, always the same ones."""
    num_held_out: Count = 64
    """Rows of train held out where validation is empty."""
    max_train_rows: CountOrZero = 0
    """Only the first so many rows of train, after the hold-out; 0 for all."""
    max_validation_rows: CountOrZero = 0
    """Only the first so many rows of validation; 0 for all."""
    corpus: str = ""
    """Plain text for objective.lm_weight: a text file (one document) or JSONL with a field text, also .gz."""
    corpus_tokens: Annotated[int, Field(ge=2)] = 512
    """Length of the corpus's blocks, of which a micro-batch takes training.batch_size."""
    prompt_format: Literal["chat", "alpaca", "plain"] = "chat"
    """chat: the tokenizer's chat template. alpaca: the paper's prompt. plain: both joined as they are."""
    max_prompt_tokens: Count = 256
    max_tokens: Count = 512
    """Prompt and completion together; longer completions are cut, and counted."""
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """What happens to a row whose prompt is longer than max_prompt_tokens; dropped rows are counted."""

    @model_validator(mode="after")
    def _a_stream_ends(self):
        if self.stream and not self.max_train_rows:
            raise ValueError("stream=true reads the first max_train_rows rows; set it above 0")
        if self.stream and self.validation and not self.max_validation_rows:
            raise ValueError("stream=true reads the first max_validation_rows rows of validation; set it above 0")
        return self

    @model_validator(mode="after")
    def _room_for_a_completion(self):
        if self.max_tokens <= self.max_prompt_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves no room for a completion after "
                f"max_prompt_tokens={self.max_prompt_tokens}; raise it"
            )
        return self


class LanguageObjective(Objective):
    lm_weight: NonNegative = 0.0
    """Of the student's next-token loss on data.corpus."""


class Fixed(Section):
    """Completions of the data."""

    kind: Literal["fixed"] = "fixed"


class OnPolicy(Section):
    """Every step trains on completions that the student samples for the prompts of its batch."""

    kind: Literal["on_policy"]
    max_new_tokens: Count = 256
    temperature: NonNegative = 1.0
    """0 decodes greedily."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most probable tokens that together hold this mass."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: transformers in the model that trains, or vLLM with a copy of it, faster on a GPU."""
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the GPU's memory for vLLM's copy and its key-value cache."""


class Mixed(OnPolicy):
    """A step trains on sampled completions with probability share, else on the data's."""

    kind: Literal["mixed"]  # type: ignore[assignment]
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """GKD's lambda."""


class Adaptive(OnPolicy):
    """DistiLLM's adaptive off-policy; needs training.validate_every. See docs/rollouts.md."""

    kind: Literal["adaptive"]  # type: ignore[assignment]
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of sampled completions at the start."""
    increase: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the threshold, after a validation with a worse loss."""
    tolerance: NonNegative = 0.1
    """Worse is a next-token loss this much above the last one that counted; nats per token."""
    capacity: Count = 1000
    """Of the replay buffer, in completions per process."""


Rollouts = Annotated[Fixed | OnPolicy | Mixed | Adaptive, Field(discriminator="kind")]


ValidationMetric = Literal["forward_kl", "reverse_kl", "alpha_beta", "token_agreement", "next_token_loss"]
"""What a validation measures. Less is better, but of token_agreement."""


class LanguageTraining(Training):
    group_by_length: bool = False
    """Batches of examples of like length: less padding, less random."""
    pack: bool = False
    """Student and teacher read the examples of a batch end to end: no padding between them, the same loss. Refused for
    a model in which they would see each other."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up; cosine and linear end at 0."""
    warmup_steps: CountOrZero = 0
    max_grad_norm: Positive = 1.0
    logits: Literal["auto", "fused", "dense"] = "auto"
    """fused makes logits chunk by chunk, with the divergence and its gradient; dense makes all of a batch; auto is
    fused where the objective and the student's output head allow it, and says which."""
    validate_every: CountOrZero = 0
    """Steps between validations during training; 0 for none but before and after."""
    save_every: CountOrZero = 0
    """Steps between checkpoints, the two last are kept; 0 for none, or under keep_best one at every validation."""
    keep_best: ValidationMetric | None = None
    """The student of the run is that of the validation where this was best, not the last; its checkpoint is kept."""

    @model_validator(mode="after")
    def _a_checkpoint_at_every_validation(self):
        if self.keep_best and not self.validate_every:
            raise ValueError(f"keep_best={self.keep_best} chooses between validations; set validate_every above 0")
        if self.keep_best and self.save_every not in (0, self.validate_every):
            raise ValueError(
                f"keep_best={self.keep_best} saves at every validation; set save_every=0 or {self.validate_every}, "
                f"not {self.save_every}"
            )
        return self

    @property
    def selected_on(self) -> str:
        return self.keep_best or "last"

    @property
    def steps_between_checkpoints(self) -> int:
        """0 for none."""
        return self.validate_every if self.keep_best else self.save_every


class EvaluationSet(Section):
    """Prompts that teacher and student answer."""

    path: str = Field(min_length=1)
    """As data.train."""
    split: str = "test"
    """Of a hub's or a saved data set with splits."""
    metric: Literal["rouge_l", "exact_match"] = "rouge_l"
    """exact_match compares final answers: what follows ####, is in \\boxed{}, or the last number."""
    max_rows: CountOrZero = 0
    """Only the first so many rows; 0 for all."""


class Evaluation(Section):
    batch_size: Count = 8
    sets: dict[str, EvaluationSet] = Field(default_factory=dict)
    """By name: answered by teacher and student before and after, in the prompt format of the data."""
    num_seeds: Count = 1
    """Samplings of each set, under the seeds 0, 1, ...; the ABKD paper's protocol has 5."""
    num_generated: CountOrZero = 0
    """Validation prompts answered by teacher and student, for ROUGE-L with the references; 0 for none."""
    max_new_tokens: Count = 128
    temperature: NonNegative = 0.0
    """0 decodes greedily."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most probable tokens that together hold this mass."""

    @model_validator(mode="after")
    def _seeds_need_sampling(self):
        if self.num_seeds > 1 and self.temperature == 0:
            raise ValueError(
                f"num_seeds={self.num_seeds} repeats a greedy answer, for temperature=0; set temperature=1 or "
                "num_seeds=1"
            )
        for name in self.sets:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"sets.{name}: a name is made of letters, digits, - and _, as it names files")
        return self


class LanguageRecipe(Recipe):
    task: Literal["language_model"]
    teacher: Teacher | None = None
    """None for supervised fine-tuning: a pretrained student, objective.kd_weight=0 and objective.ce_weight=1."""
    student: Student
    data: Data
    objective: LanguageObjective
    training: LanguageTraining
    rollouts: Rollouts = Fixed()
    """Whose completions the student trains on."""
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _a_teacher_where_one_is_needed(self):
        if self.teacher is None and self.objective.kd_weight > 0:
            raise ValueError(
                "there is no teacher; set teacher.path=PATH, or for supervised fine-tuning objective.kd_weight=0 "
                "objective.ce_weight=1"
            )
        if isinstance(self.student, Shrink) and not self.student.path and not isinstance(self.teacher, InProcess):
            found = "" if self.teacher is None else f", and teacher.kind={self.teacher.kind} loads none"
            raise ValueError(
                f"student.kind=shrink needs a teacher to shrink{found}; set teacher.path, student.path to the model "
                "that is to be shrunk, or student.kind=pretrained"
            )
        if self.teacher is None and self.training.keep_best not in (None, "next_token_loss"):
            raise ValueError(
                f"training.keep_best={self.training.keep_best} compares with a teacher, and there is none; "
                "set it to next_token_loss"
            )
        return self

    @model_validator(mode="after")
    def _a_teacher_that_can_do_it(self):
        for teacher in self.teachers:
            if not isinstance(teacher, InProcess):
                continue
            if teacher.quantization != "none" and isinstance(self.student, Shrink) and not self.student.path:
                raise ValueError(
                    f"student.kind=shrink takes layers out of the teacher, whose weights are in {teacher.quantization}"
                    "; set teacher.quantization=none"
                )
            if teacher.remember and self.training.engine == "fsdp2":
                raise ValueError(
                    "teacher.remember=true leaves out forwards of a teacher that all processes hold together; "
                    "set it false, or training.engine=ddp"
                )
        return self

    @property
    def teachers(self) -> tuple[InProcess | Cached | Served, ...]:
        """The one, those of a mixture, or none."""
        if self.teacher is None:
            return ()
        return self.teacher.teachers if isinstance(self.teacher, Mixture) else (self.teacher,)

    @model_validator(mode="after")
    def _sets_of_a_whole_student(self):
        if self.training.engine == "fsdp2" and self.evaluation.sets:
            raise ValueError(
                "evaluation.sets are answered by one process, and training.engine=fsdp2 splits the student; leave them "
                "out, and measure with: abkd eval RUN evaluation.sets=..."
            )
        return self

    @model_validator(mode="after")
    def _whole_weights_to_merge(self):
        if self.training.engine == "fsdp2" and self.student.lora and self.student.lora.merge:
            raise ValueError(
                "student.lora.merge=true needs whole weights, which training.engine=fsdp2 splits; set it false"
            )
        return self

    @model_validator(mode="after")
    def _a_corpus_where_it_counts(self):
        if bool(self.data.corpus) != (self.objective.lm_weight > 0):
            found = f"data.corpus={self.data.corpus!r} and objective.lm_weight={self.objective.lm_weight:g}"
            raise ValueError(f"{found} go together; set both, or neither")
        return self

    @model_validator(mode="after")
    def _rollouts_fit(self):
        if isinstance(self.rollouts, Fixed):
            return self
        kind = self.rollouts.kind
        if self.teacher is None or self.objective.kd_weight == 0:
            raise ValueError(
                f"rollouts.kind={kind} needs a teacher and objective.kd_weight above 0; set rollouts.kind=fixed"
            )
        for teacher in self.teachers:
            if isinstance(teacher, Cached):
                raise ValueError(
                    f"teacher.kind=cached knows what the teacher says of the data, and rollouts.kind={kind} samples "
                    "new texts; set rollouts.kind=fixed, or a teacher that is loaded or served"
                )
            if isinstance(teacher, InProcess) and teacher.remember:
                raise ValueError(
                    f"teacher.remember=true keeps what the teacher says of the data, and rollouts.kind={kind} samples "
                    "new texts; set teacher.remember=false"
                )
        if self.objective.ce_weight > 0 and kind == "on_policy":
            raise ValueError(
                f"objective.ce_weight={self.objective.ce_weight:g} is of the data's completions, and "
                "rollouts.kind=on_policy never trains on them; set objective.ce_weight=0, or rollouts.kind=mixed"
            )
        if self.objective.kd_warmup > 0:
            raise ValueError(
                f"objective.kd_warmup={self.objective.kd_warmup:g} starts with the data's completions alone, and "
                f"rollouts.kind={kind} does without them; set objective.kd_warmup=0"
            )
        if kind == "adaptive" and self.training.validate_every == 0:
            raise ValueError("rollouts.kind=adaptive goes by the validation loss; set training.validate_every above 0")
        if self.rollouts.engine == "vllm" and self.training.engine != "ddp":
            raise ValueError(
                f"rollouts.engine=vllm is sent a whole student, and training.engine={self.training.engine} shards it; "
                "set rollouts.engine=transformers"
            )
        return self
