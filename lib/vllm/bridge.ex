defmodule VLLM.Bridge do
  @moduledoc false
  # The bridge between Elixir and Python workers. Its parts: Program (the port
  # program and its guard), Connection (requests and answers), Inbox (where
  # answers come to), Frames (cuts what the port reads), Writer (writing to a
  # full pipe), Log (what workers print), MessagePack (the format) and Session (a
  # worker for a few questions).

  alias VLLM.Bridge.Session
  alias VLLM.Error

  @doc """
  Starts a worker, shakes hands and ends it: whether the two sides can talk.

  The result is what the worker says of itself (guides/protocol.md, `hello`).
  Options: `:timeout` in milliseconds, default 30,000; `:python`, the path of
  the interpreter.
  """
  @spec handshake(keyword()) :: {:ok, map()} | {:error, Error.t()}
  def handshake(opts \\ []), do: Session.run(:engine, opts, &{:ok, &1.hello})
end
