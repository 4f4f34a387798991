"""The durable truth of who may hold what: HTTP API, links to appliances, sessions of agents."""
