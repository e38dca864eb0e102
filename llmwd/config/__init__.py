"""The configuration: files that bash evaluates, checked into settings and a profile, and what vLLM is started with."""

from llmwd.config.argv import Endpoint, api_key, base_url, endpoint, serve_argv, serve_environment
from llmwd.config.load import Loaded, learn_profiles, load
from llmwd.config.problems import ConfigError, Problem
from llmwd.config.profile import Profile, active_profile, profile_names, set_active
from llmwd.config.settings import SETTINGS, Settings, SettingSpec

__all__ = [
    "SETTINGS",
    "ConfigError",
    "Endpoint",
    "Loaded",
    "Problem",
    "Profile",
    "SettingSpec",
    "Settings",
    "active_profile",
    "api_key",
    "base_url",
    "endpoint",
    "learn_profiles",
    "load",
    "profile_names",
    "serve_argv",
    "serve_environment",
    "set_active",
]
