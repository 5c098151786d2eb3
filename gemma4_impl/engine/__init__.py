"""Fast inference at small batches: packed weights, static caches, each token one replay of a CUDA graph; and the same
steps on the CPU."""

from gemma4_impl.engine.generate import Engine as Engine
from gemma4_impl.engine.generate import generate as generate
from gemma4_impl.engine.model import PackedModel as PackedModel
from gemma4_impl.engine.random import RandomWeights as RandomWeights
from gemma4_impl.engine.random import random_model as random_model
from gemma4_impl.engine.session import Session as Session
