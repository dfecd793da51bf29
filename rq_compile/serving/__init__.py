"""An HTTP server for one engine with the endpoints of OpenAI's API: completions, chat completions and models."""
