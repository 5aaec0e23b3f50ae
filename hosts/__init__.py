"""The only room that knows who runs us; everyone else asks `hosts.api`."""
