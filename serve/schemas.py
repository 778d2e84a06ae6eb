"""What clients may send. Fields are OpenAI's; what is ours lies in one field, ``hrs``.

A parameter that this server does not have is refused by name, unless its value asks for nothing: a penalty that has no
effect must not look as if it had one.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator

_UINT = 2**63 - 1


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is not valid Unicode at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Ids = Annotated[list[Annotated[StrictInt, Field(ge=0, le=_UINT)]], Field(min_length=1)]


def _nullable(schema: dict[str, Any]) -> None:
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class Body(BaseModel):
    """Unknown fields are refused, and nothing is converted: "5" is not 5. null is a field's default, if it has one: so
    OpenAI's API has it, and some clients send it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_nullable)

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Parameters of OpenAI's that are not supported, with the values besides null that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        wanted = [
            name
            for name, harmless in cls.neutral.items()
            if values.get(name) is not None and not any(_same(values[name], each) for each in harmless)
        ]
        if wanted:
            raise ValueError(f"this server does not support {', '.join(map(repr, wanted))}: leave out what it lacks")
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {
            name: value
            for name, value in values.items()
            if name not in cls.neutral and not (value is None and name in optional)
        }


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(max_length=16), BeforeValidator(_as_list)
]


class RetrievalOptions(Body):
    """Looking up memories while a text is written. The gate opens where the model is unsure."""

    mode: Literal["text", "slots", "both", "observe"] = "text"
    """``text``: what was found is put before the text that the model reads. ``slots``: the model attends to its keys
    (models with retrieved engrams only). ``both``. ``observe``: it is told, and nothing is done with it."""
    k: int | None = Field(None, ge=1, le=32)
    min_similarity: float | None = Field(None, ge=-1, le=1)
    threshold_bits: float | None = Field(None, ge=0, le=64)
    """Rolling entropy above which memories are looked up; 0 does it whenever the gate may open."""
    topics: list[Text] | None = Field(None, max_length=64)
    """Look only at memories of these topics."""
    exclude_sources: list[Text] = Field(default_factory=list, max_length=64)


def _as_options(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class HrsOptions(Body):
    """What this server can do beyond OpenAI's API."""

    top_k: int = Field(0, ge=0, le=_UINT)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    details: bool = False
    """Tell of every token its id, log-probability and entropy."""
    retrieval: Annotated[RetrievalOptions | None, BeforeValidator(_as_options)] = None
    """true for the defaults."""
    topics: bool = False
    """Sort the prompt into its topic and let the model read that topic's earlier prompts before it."""


class StreamOptions(Body):
    neutral = {"include_obfuscation": (False,)}
    include_usage: bool = False


class Sampled(Body):
    """What completions and chats share."""

    model: Text
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=_UINT)
    stop: Stop | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None
    """Accepted, and not used."""
    hrs: HrsOptions = Field(default_factory=lambda: HrsOptions.model_validate({}))

    @model_validator(mode="after")
    def _usage_is_of_streams(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true only: leave it out")
        return self


_NEITHER = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}


class CompletionRequest(Sampled):
    neutral = {**_NEITHER, "best_of": (1,), "suffix": ("",)}

    prompt: Text | Annotated[list[Text], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    max_tokens: int | None = Field(16, ge=0, le=_UINT)
    """0 is for ``echo``: nothing is added."""
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    """Tell log-probabilities of every token, and of so many of the likeliest."""

    @model_validator(mode="after")
    def _nothing_only_with_echo(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens of 0 needs echo: ask for a token at least, or for the prompt back")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    neutral = {"refusal": (), "audio": (), "function_call": (), "tool_calls": ([],), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = Field(None, max_length=64)

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampled):
    neutral = {
        **_NEITHER,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "metadata": ({},),
        "reasoning_effort": ("none",),
        "audio": (),
        "moderation": (),
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "safety_identifier": (),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1, le=_UINT)
    max_completion_tokens: int | None = Field(None, ge=1, le=_UINT)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    """How many of the likeliest tokens to tell of with each."""

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class EmbeddingRequest(Body):
    model: Text
    input: Text | Annotated[list[Text], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: Text | None = None


class MemoryRequest(Body):
    """Texts to remember, each as one memory."""

    input: Text | Annotated[list[Text], Field(min_length=1)]
    source: Text = Field("api", min_length=1, max_length=256)
    topic: Text | None = Field(None, min_length=1, max_length=256)
    """A topic's id. ``auto`` sorts each text into its nearest topic, or makes a new one."""


class SearchRequest(Body):
    query: Text = Field(min_length=1)
    k: int = Field(5, ge=1, le=100)
    min_similarity: float = Field(-1.0, ge=-1, le=1)
    topics: list[Text] | None = Field(None, max_length=64)
    sources: list[Text] | None = Field(None, max_length=64)


class TopicChange(Body):
    enabled: bool | None = None
    """Whether its texts are given to the model and its memories are found."""
    name: Text | None = Field(None, min_length=1, max_length=256)
    into: Text | None = Field(None, min_length=1, max_length=256)
    """Id of another topic, which this one becomes part of."""

    @model_validator(mode="after")
    def _something(self) -> "TopicChange":
        if self.enabled is None and self.name is None and self.into is None:
            raise ValueError("nothing to change: give enabled, name or into")
        return self
