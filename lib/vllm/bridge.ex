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

  # Exit statuses with a meaning of their own; see guides/protocol.md.
  @engine_died 70
  @not_installed 78

  @doc "The error for a program that ended with a status, and with these last lines in its log."
  @spec ended(non_neg_integer(), [String.t()]) :: Error.t()
  def ended(@not_installed, log) do
    Error.new(
      :vllm_not_installed,
      "This Python lacks the packages that a worker needs. Run `mix vllm.setup`, or have " <>
        "`python:` name an interpreter that has vLLM.",
      %{"log" => log}
    )
  end

  def ended(@engine_died, log) do
    Error.new(
      :engine_dead,
      "vLLM's engine ended under the worker. `details[\"log\"]` has its last lines.",
      %{"status" => @engine_died, "log" => log}
    )
  end

  def ended(status, log) do
    how =
      if status > 128,
        do: "was killed by signal #{status - 128}",
        else: "ended with status #{status}"

    hint =
      if status == 137,
        do: "The system may have killed it for want of memory (see `dmesg`).",
        else: "`details[\"log\"]` has its last lines."

    Error.new(:engine_dead, "The worker #{how}. #{hint}", %{"status" => status, "log" => log})
  end
end
