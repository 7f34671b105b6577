"""Recipes as pydantic models.

`loading` reads a YAML file, applies `key=value` overrides (`overrides`) and validates; `keys` knows
what each key may hold, `messages` says what is wrong. The root models are `recipe` (`agentloop
train`) and `sft` (`agentloop sft`); their sections are in `run`, `rollout`, `trainer` and
`algorithm`, and `section` is their base class. A field's description is its
documentation: `docs` prints it for `agentloop config` and docs/config.md, so every key is
documented and no documented key is missing.
"""

from __future__ import annotations

from agentloop.config.algorithm import ESTIMATORS, AlgorithmConfig, CorrectionConfig, Needs, ShapingConfig
from agentloop.config.recipe import AgentConfig, DataConfig, EvalConfig, Recipe, RewardConfig
from agentloop.config.rollout import EvalSamplingConfig, PublishConfig, RolloutConfig, SamplingConfig
from agentloop.config.run import (
    CheckpointConfig,
    ClusterConfig,
    ExporterConfig,
    LoggerConfig,
    ModelConfig,
    OtlpConfig,
    RunConfig,
    SpanSampling,
    TraceConfig,
    WeaveConfig,
)
from agentloop.config.section import Section
from agentloop.config.sft import SftModel, SftRecipe, SftRunConfig, SftStage
from agentloop.config.trainer import CriticConfig, FsdpConfig, LoraConfig, OptimConfig, TrainerConfig

__all__ = [
    "ESTIMATORS",
    "AgentConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "CorrectionConfig",
    "CriticConfig",
    "DataConfig",
    "EvalConfig",
    "EvalSamplingConfig",
    "ExporterConfig",
    "FsdpConfig",
    "LoggerConfig",
    "LoraConfig",
    "ModelConfig",
    "Needs",
    "OptimConfig",
    "OtlpConfig",
    "PublishConfig",
    "Recipe",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "Section",
    "SftModel",
    "SftRecipe",
    "SftRunConfig",
    "SftStage",
    "ShapingConfig",
    "SpanSampling",
    "TraceConfig",
    "TrainerConfig",
    "WeaveConfig",
]
