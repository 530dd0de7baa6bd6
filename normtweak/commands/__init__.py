"""The commands, a file each: parse, call, print; no logic of their own."""
