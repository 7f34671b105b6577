"""Recipes as pydantic models. A field's description is its documentation: `agentloop config` and the docs print it,
so no key can be documented that does not exist, and no key exists undocumented.
"""

from __future__ import annotations

from agentloop.config.algorithm import ESTIMATORS, AlgorithmConfig, CorrectionConfig, Needs, ShapingConfig
from agentloop.config.recipe import AgentConfig, DataConfig, EvalConfig, Recipe, RewardConfig
from agentloop.config.rollout import PublishConfig, RolloutConfig, SamplingConfig
from agentloop.config.run import CheckpointConfig, ClusterConfig, LoggerConfig, ModelConfig, RunConfig, TraceConfig
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
    "FsdpConfig",
    "LoggerConfig",
    "LoraConfig",
    "ModelConfig",
    "Needs",
    "OptimConfig",
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
    "TraceConfig",
    "TrainerConfig",
]
