"""Topics: prompts grouped online by what they are about, and stress tests of how well an embedding does it."""

from hrs.retrieval.topics.contexts import TopicContexts
from hrs.retrieval.topics.records import Assignment, Match, Prompt, Topic, TopicInfo, shares

__all__ = ["Assignment", "Match", "Prompt", "Topic", "TopicContexts", "TopicInfo", "shares"]
