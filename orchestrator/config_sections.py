"""The sections of a configuration that describe one run, and the stages that override them; see `orchestrator.config`.

A section is frozen and knows no other keys; what values mean together is judged in `orchestrator.config_rules`.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
)

from orchestrator.config_rules import (
    check_different,
    check_inputs,
    check_interface,
    check_milestones,
    check_name,
    check_plan,
    check_selectors,
)

# A wrapped field is judged as Python values, where a strict tuple would not take the list that YAML holds.
AS_LIST = Strict(False)

Selector = Annotated[int, Field(ge=1)] | Annotated[str, Field(min_length=1)]
Selectors = Annotated[tuple[Selector, ...], AS_LIST, BeforeValidator(check_selectors)]
SteName = Literal["clipped", "polynomial", "ede", "identity"]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Section):
    """Which network."""

    name: str = Field(min_length=1, description="model of the zoo; `dab models` lists them")
    num_classes: int | None = Field(
        default=None, ge=2, description="classes to tell apart; null: those of the data set"
    )
    input_size: int | None = Field(
        default=None, ge=1, description="side of the square input, pixels; null: the model's own"
    )
    in_channels: Literal[1, 3] | None = Field(
        default=None, description="1 for grey, 3 for colour; null: the model's own"
    )
    width: float = Field(default=1.0, gt=0, le=16, description="factor on the number of channels of each layer")
    block: Literal["reference", "bireal"] | None = Field(
        default=None,
        description="reference: BN, sign, convolution, ReLU; bireal: a shortcut round every convolution with binary "
        "inputs; null: as the model has it",
    )
    activation: Literal["relu", "rprelu"] | None = Field(
        default=None,
        description="after a convolution; rprelu learns a shift before, a slope below and a shift after; null: the "
        "model's own",
    )


def _words_or_layers(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(check_selectors(value))
    except ValidationError:
        raise ValueError(
            "must be model, none or a list of layer numbers, paths or regular expressions, such as [2, 'stage3.*']"
        ) from None


class PlanSets(Section):
    """A layer plan written out."""

    weights: Selectors = Field(default=(), description="layers with binary weights")
    inputs: Selectors = Field(default=(), description="layers with binary inputs")


def _file_or_sets(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(check_plan(value))
    except ValidationError:
        raise ValueError("must be the name of a file, or {weights: [2, 3], inputs: [2, 'stage3.*']}") from None


class Binarize(Section):
    """Which layers are binary, and how.

    A layer is named by its number from 1, as `dab models show` prints it, by its path, or by a regular expression that
    must match whole paths. At most one of the range, `layers` and `plan` says which weights are binary.
    """

    weights: Literal["dab", "dab_warm", "dab_learned", "xnor", "xnor_centered", "lsbq", "adabin", "sign"] = Field(
        default="dab", description="quantizer of the binary weights"
    )
    center: Literal["none", "filter", "tap"] | None = Field(
        default=None, description="mean subtracted before quantizing; null: tap where the input is binary, else none"
    )
    inputs: Annotated[
        Literal["model", "none"] | Selectors,
        WrapValidator(_words_or_layers),
        AfterValidator(check_inputs),
    ] = Field(default="model", description="layers with binary inputs: model (as its variant says), none, or a list")
    bin_start: int | None = Field(
        default=None, ge=1, description="first layer with binary weights; null: the model's own"
    )
    bin_end: int | None = Field(default=None, ge=1, description="last layer with binary weights; null: the model's own")
    layers: Annotated[Selectors, AfterValidator(check_different)] | None = Field(
        default=None, description="layers with binary weights, instead of a range; [] for none; null: the range says it"
    )
    plan: Annotated[str | PlanSets | None, WrapValidator(_file_or_sets)] = Field(
        default=None,
        description="all binary layers: {weights: [...], inputs: [...]}, or the name of a file of that form",
    )
    ste: SteName | None = Field(
        default=None, description="straight-through estimator of the binary weights; null: the model's own"
    )
    ste_width: float | None = Field(
        default=None, gt=0, description="half width of its window, in units of the weight; null: the model's own"
    )
    ste_center: Literal["zero", "threshold"] | None = Field(
        default=None, description="middle of its window: 0, or (alpha + beta) / 2 of the filter; null: the model's own"
    )
    gradient: Literal["straight_through", "means", "reference"] | None = Field(
        default=None,
        description="straight_through: alpha and beta are constants; means: differentiable; reference: the reference "
        "program's factor; null: the model's own",
    )
    input_quantizer: Literal["sign", "rsign", "two_valued"] | None = Field(
        default=None,
        description="binary inputs: sign; rsign learns a shift per channel first; two_valued: two values a sample; "
        "null: the model's own",
    )
    input_ste: SteName | None = Field(
        default=None, description="straight-through estimator of the binary inputs; null: the model's own"
    )
    input_ste_width: float | None = Field(
        default=None, gt=0, description="half width of its window, in units of the input; null: the model's own"
    )


class RandAugment(Section):
    """Random operations on each training image (arXiv 1909.13719)."""

    num_ops: int = Field(default=2, ge=1, le=14, description="operations in a row on each image")
    magnitude: int = Field(default=9, ge=0, le=30, description="strength of the operations")


class Augment(Section):
    """What is done to training images besides the transform."""

    randaugment: RandAugment | None = Field(default=None, description="random operations on each image; null: none")
    erasing: float = Field(
        default=0.0, ge=0, le=1, description="probability that a rectangle of an image is erased (arXiv 1708.04896)"
    )
    mixup: float = Field(
        default=0.0, ge=0, le=100, description="alpha of the share that two images are mixed with; 0: not mixed"
    )
    cutmix: float = Field(
        default=0.0, ge=0, le=100, description="alpha of the share of a rectangle put into another image; 0: none"
    )


class Data(Section):
    """Samples and batches."""

    train: str = Field(
        min_length=1,
        description="folder or URL (s3, http, https) of what `dab data build` made; its split train is learned from",
    )
    val: str | None = Field(
        default=None, min_length=1, description="folder or URL whose split val measures accuracy; null: data.train"
    )
    batch_size: int = Field(default=256, ge=2, description="samples of one optimizer step over all workers")
    eval_batch_size: int = Field(default=64, ge=1, description="samples of one evaluation batch on one worker")
    num_loaders: int = Field(default=2, ge=0, description="loader processes a worker; 0 loads in the worker itself")
    transform: Literal["auto", "plain", "crop_flip", "sketch", "sketch_no_flip", "imagenet"] = Field(
        default="auto",
        description="how images are prepared: plain resizes; crop_flip also crops and mirrors; sketch takes any part, "
        "mirrors, rotates and inverts; sketch_no_flip does not mirror; imagenet takes any part and mirrors",
    )
    ten_crop: bool = Field(
        default=False,
        description="whether accuracy is measured on the mean over ten crops of each image, so that an evaluation "
        "batch holds ten times as many; with sketch, sketch_no_flip and imagenet",
    )
    mean: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], AS_LIST] | None = Field(
        default=None,
        description="what is subtracted from each channel of the pixels, in 0..1 (inverted ones where the transform "
        "inverts); null: the mean of the training images",
    )
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], AS_LIST] | None = Field(
        default=None, description="what each channel is divided by after that; null: the images' standard deviation"
    )
    augment: Augment = Field(default=Augment(), description="what else is done to training images")
    remainder: Literal["keep", "drop"] = Field(
        default="keep", description="what happens to the last, smaller batch of an epoch"
    )
    window: int = Field(
        default=65536, ge=1, description="training samples that are mixed with each other; shards are always shuffled"
    )
    max_bad_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of an epoch's samples that may be undecodable; they are left out and counted as bad_samples",
    )
    cache_folder: str | None = Field(
        default=None,
        min_length=1,
        description="folder on each machine for shards behind a URL; null: cache/shards under DAB_HOME",
    )
    cache_gb: float = Field(default=50.0, gt=0, description="most space of that folder, GB; oldest shards go first")
    retry_s: float = Field(
        default=600.0, ge=0, description="seconds that a server which does not answer is waited for before failing"
    )
    decoded_cache_gb: float = Field(
        default=0.0,
        ge=0,
        description="most space for decoded images, GB, so that each is decoded once; 0 decodes them again each epoch",
    )


class Optim(Section):
    """The optimizer and the limits of its learning rate."""

    name: Literal["adam", "adamw", "sgd", "adagrad", "adamax", "adadelta"] = Field(
        default="adam", description="optimizer"
    )
    max_lr: float = Field(default=5e-4, gt=0, description="highest learning rate")
    min_lr: float = Field(default=1e-5, ge=0, description="learning rate that the schedule does not go below")
    weight_decay: float = Field(
        default=0.0, ge=0, description="weight decay, 1/step, as torch's optimizer of that name uses it"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum; sgd only")
    nesterov: bool = Field(default=False, description="Nesterov momentum; sgd only")
    decay_all: bool = Field(
        default=False,
        description="whether weight decay also acts on BatchNorm, biases, scales, shifts and slopes",
    )


class Schedule(Section):
    """The learning rate as a function of the epoch."""

    name: Literal["decay", "step", "cosine", "linear", "one_cycle", "constant"] = Field(
        default="decay", description="shape"
    )
    interval: int = Field(default=50, ge=1, description="epochs between two drops; decay only")
    level: float = Field(
        default=2.0, ge=1, description="factor that the rate is divided by at each drop; decay and step only"
    )
    milestones: Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(check_milestones)] = Field(
        default=(), description="epochs, counted from the start of the run or stage, at which it drops; step only"
    )
    warmup_epochs: float = Field(default=0.0, ge=0, description="epochs over which the rate first rises from 0")


class Checkpoint(Section):
    """When a checkpoint is written and which are kept."""

    every_epochs: int = Field(default=1, ge=1, description="epochs between two checkpoints; the last writes one too")
    every_steps: int | None = Field(
        default=None, ge=1, description="optimizer steps between two further checkpoints; null: none within an epoch"
    )
    keep_last: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
    keep_best: int = Field(default=1, ge=1, description="checkpoints of highest val_top1 that are kept besides")
    retry_s: float = Field(
        default=3600.0,
        gt=0,
        description="seconds that a store behind a URL may be away before the run fails; training goes on meanwhile",
    )


class Kurtosis(Section):
    """A penalty on the shape of the latent weights' distribution."""

    weight: float = Field(gt=0, description="factor of the penalty in the loss")
    target: float = Field(default=1.8, ge=1, description="kurtosis aimed at: 3 normal, 1.8 uniform, 1 two equal peaks")


class Distill(Section):
    """Learning from the soft answers of a trained network."""

    teacher: str = Field(min_length=1, description="run, checkpoint file, or stage:NAME for an earlier stage's end")
    temperature: float = Field(default=4.0, gt=0, description="divisor of both networks' logits")
    weight: float = Field(
        default=0.5, gt=0, le=1, description="share of the distillation in the loss, the labels have the rest"
    )


class Stage(Section):
    """A part of a run that begins with the weights of the one before; what it writes replaces the run's own values.

    Of binarize, optim and schedule only the keys that are written count, so those sections are kept as written.
    """

    name: Annotated[str, AfterValidator(check_name)] = Field(description="name of the stage, unique in the run")
    epochs: int = Field(ge=1, description="passes over the training split")
    binarize: Binarize | None = Field(default=None, description="keys of binarize that differ in this stage")
    optim: Optim | None = Field(default=None, description="keys of optim that differ in this stage")
    schedule: Schedule | None = Field(default=None, description="keys of schedule that differ in this stage")
    label_smoothing: float | None = Field(
        default=None, ge=0, lt=1, description="label smoothing of this stage; null, written: none"
    )
    kurtosis: Kurtosis | None = Field(default=None, description="kurtosis penalty of this stage; null, written: none")
    distill: Distill | None = Field(default=None, description="teacher of this stage; null, written: none")

    @model_serializer
    def _written(self) -> dict[str, Any]:
        """Return what was written, and nothing else: null takes a penalty or a teacher away, silence keeps it."""
        values = {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set}
        return {
            key: value.model_dump(mode="json", exclude_unset=True) if isinstance(value, Section) else value
            for key, value in values.items()
        }


class Train(Section):
    """The training loop."""

    epochs: int = Field(default=100, ge=1, description="passes over the training split; with stages, the sum of theirs")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="arithmetic of the training steps; bf16 keeps weights and evaluation in float32"
    )
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="run (id, prefix or name) or checkpoint file whose weights to start from",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of the target that is spread evenly over all classes"
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay per step of the weights' moving average that is evaluated; null: none",
    )
    sync_bn: bool = Field(default=False, description="whether BatchNorm takes its statistics over all workers")
    kurtosis: Kurtosis | None = Field(default=None, description="penalty on the latent weights' kurtosis; null: none")
    distill: Distill | None = Field(default=None, description="a teacher to learn from; null: none")
    instruments: bool = Field(
        default=True, description="whether each layer is measured every epoch: bits flipped, balance, dead filters"
    )
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] | None = Field(
        default=None, description="parts of the run, in order; null: one part, as the sections above say"
    )
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="when a checkpoint is written and which are kept")


class Cluster(Section):
    """Which cluster the run goes to, and what it takes from it."""

    address: str | None = Field(
        default=None,
        min_length=1,
        description="cluster unless --address names another: URL of a Jobs API or name of clusters.toml; null: this "
        "machine's own",
    )
    num_workers: int = Field(
        default=2,
        ge=0,
        description="processes that train together, each on a share of a batch; 0 trains in the job's own process",
    )
    gpus_per_worker: float = Field(
        default=0.0, ge=0, description="GPUs of one worker, a part of one for a single worker only; 0 trains on the CPU"
    )
    cpus_per_worker: float = Field(default=1.0, gt=0, description="CPU cores of one worker")
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="fewest workers to go on with while nodes are gone; null: all num_workers are waited for",
    )
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = Field(
        default="pack",
        description="where workers go: pack on few nodes, spread over many, strict_pack on one node or not at all, "
        "strict_spread one a node or not at all",
    )
    interface: Annotated[str, AfterValidator(check_interface)] | None = Field(
        default=None, description="network interface that workers talk over, such as eth0; null: found on each node"
    )
    labels: dict[str, str] = Field(
        default={}, description="labels that a node must have to hold a worker, such as {pool: lab}; {}: any node"
    )
    max_failures: int = Field(default=3, ge=0, description="restarts after a failure before the run counts as failed")
    hang_s: float = Field(
        default=600.0,
        gt=0,
        description="seconds without a step after which the stacks of all workers are saved and the attempt fails",
    )
    start_timeout_s: float = Field(
        default=60.0,
        ge=5,
        description="seconds that Ray may take to set the places of the workers aside before others are looked for",
    )
    priority: int = Field(
        default=0, ge=-1000, le=1000, description="place in the queue of the cluster: higher ones start first"
    )
    wait: bool = Field(
        default=False, description="whether the run is queued while the cluster is too small for it, not refused"
    )

    @property
    def num_processes(self) -> int:
        """Processes that train when all are there: the workers, or the job's own."""
        return max(1, self.num_workers)


class Tracking(Section):
    """Where runs are recorded."""

    uri: str | None = Field(
        default=None, min_length=1, description="MLflow server; null: one of our own under DAB_HOME"
    )
    experiment: str = Field(
        default="dab", min_length=1, max_length=100, description="MLflow experiment that the run belongs to"
    )
    system_metrics_s: float = Field(
        default=10.0,
        ge=0,
        description="seconds between two samples of the load (CPU, memory, disk, network, GPUs) of rank 0's machine, "
        "more on long runs; 0: none",
    )
