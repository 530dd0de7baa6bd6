"""Other people's engines, one file each, imported when the engine is and not before."""

from .hooks import after_import

# transformers has registries for quantizers but no entry point that would fill them; peft has neither.
after_import("transformers.quantizers.auto", "normtweak.integrations.transformers")
after_import("peft.tuners.lora.model", "normtweak.integrations.peft")
