"""The only folder that knows who runs us; nodes ask `hosts.api`."""
