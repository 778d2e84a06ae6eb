"""What can be set about an endpoint: the arguments of ``serve.app:build`` and the options of ``hrs serve``."""

import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hrs.errors import HRSError
from hrs.files import absolute_path
from hrs.retrieval.topics.fit import LEAST_AUC
from serve.origins import require_origins

MOST_OTHERS = 64
"""Requests of a replica at once that need no slot, of each kind."""


class Settings(BaseModel):
    """One endpoint. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    model: str
    """A run's directory, one of its checkpoints, an artifact, or ``mlflow:NAME@ALIAS``."""
    name: str | None = None
    """What clients call the model; its preset's name if not given."""
    storage: str | None = None
    """Storage root; ``$HRS_STORAGE`` or the default if not given. Replicas on other machines need the same folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` is the GPU that a replica reserved (``gpus_per_replica``), and the CPU if it reserved none."""
    threads: int = Field(1, ge=1, le=4096)
    """CPU threads of torch in each replica."""

    slots: int = Field(8, ge=1)
    """Texts a replica continues at the same time."""
    max_queue: int = Field(64, ge=0)
    """Texts that may wait for a slot of a replica; one more is refused with 429."""
    max_choices: int = Field(16, ge=1)
    """Texts one request may ask for: prompts times ``n``."""
    max_body_bytes: int = Field(2**20, ge=1)
    body_seconds: float = Field(30.0, gt=0)
    """In which the body of a request has to be complete."""
    max_prompt_tokens: int = Field(8192, ge=1)
    """A prompt beyond the model's context is read in windows, so this bounds work, not ability."""
    max_new_tokens: int = Field(2048, ge=1)
    default_chat_tokens: int = Field(256, ge=1)
    """Length of a chat reply whose request names none."""
    max_memory_texts: int = Field(64, ge=1)
    """Texts of one request to remember."""
    max_embedding_texts: int = Field(2048, ge=1)
    """Texts of one request to embed; OpenAI's limit."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float | None = Field(None, gt=0)
    """Requests per replica the autoscaler aims at; as many as there are slots if not given."""
    upscale_delay_seconds: float = Field(10.0, ge=0)
    downscale_delay_seconds: float = Field(300.0, ge=0)
    cpus_per_replica: float = Field(1.0, ge=0)
    gpus_per_replica: float = Field(0.0, ge=0)
    """What a replica reserves, such as 0.5 for two on one GPU, each with half of its memory; 0 for the CPU. The
    command ``hrs serve`` plans it itself."""
    grace_seconds: float = Field(30.0, ge=0)
    """How long running replies may take to end when the endpoint stops."""

    api_key_file: str | None = None
    """A file with one key per line. Without it ``$HRS_API_KEY`` is the key; without both nobody is asked for one."""

    allowed_hosts: list[str] = Field(default_factory=list)
    """Names besides its own under which an endpoint on the loopback interface is asked, such as that of a proxy."""

    allowed_origins: list[str] = Field(default_factory=list)
    """Origins of pages of other sites that a browser may let ask, such as ``http://localhost:3000``; ``*`` for all."""

    memories: str | None = None
    """Folder of an engram store, such as one that jobs/populate_store.py filled. The model's own below the storage root
    if not given."""
    memory_block: int | None = None
    """The block whose output makes keys of memories, negative from the end; the final states if not given."""
    memory_normalisation: Literal["none", "centred", "whitened"] = "none"
    topic_least_auc: float = Field(LEAST_AUC, ge=0, le=1)
    """Topics are off if the model's engrams tell subjects apart less well than that."""
    max_topics: int = Field(256, ge=7)
    """Topics that are kept besides those that users named or switched off; the one used longest ago goes first."""
    retrieval_k: int = Field(1, ge=1, le=32)
    retrieval_min_similarity: float = Field(0.3, ge=-1, le=1)
    retrieval_threshold_bits: float | None = Field(None, ge=0)
    """Rolling entropy above which memories are looked up. If not given it is calibrated on the model's own validation
    split where that is at hand; otherwise a request has to bring its own."""

    _origins = field_validator("allowed_origins")(require_origins)

    @model_validator(mode="after")
    def _replicas(self) -> "Settings":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self

    @property
    def reserves_gpu(self) -> bool:
        """True if replicas run on a GPU."""
        return self.device != "cpu" and self.gpus_per_replica > 0


def most_texts(settings: Settings) -> int:
    """Return the requests of a replica that generate or wait for it at once: each has a text or more."""
    return settings.slots + settings.max_queue


def parse_settings(values: dict[str, object]) -> Settings:
    """Settings from plain values.

    Raises:
        HRSError: naming every field that is wrong.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise HRSError(f"the endpoint's settings are wrong: {wrong}") from None


def require_absolute(settings: Settings) -> None:
    """Raises HRSError for a relative path: replicas read it in working directories of their own."""
    for name in ("model", "storage", "memories", "api_key_file"):
        value = getattr(settings, name)
        is_name = name == "model" and (os.sep not in value or "@" in value or value.startswith("mlflow:"))
        if value and not is_name and not value.startswith((os.sep, "~")):
            raise HRSError(f"{name} is {value}, and replicas have other working directories: give its whole path")


def read_api_keys(settings: Settings) -> list[str]:
    """The keys a request may carry; none if nobody is asked for one.

    Raises:
        HRSError: if the key file cannot be read or holds no key.
    """
    if settings.api_key_file is None:
        return [key] if (key := os.environ.get("HRS_API_KEY", "").strip()) else []
    try:
        lines = absolute_path(settings.api_key_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HRSError(f"key file {settings.api_key_file} cannot be read ({error}): give another") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise HRSError(f"key file {settings.api_key_file} holds no key: write one per line, or give no file")
    return keys
