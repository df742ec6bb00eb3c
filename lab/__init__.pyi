from lab.core import InputError as InputError
from lab.core import SamplingParams as SamplingParams
from lab.llm import LLM as LLM
