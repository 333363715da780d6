defmodule VLLM.Bridge.ExitStatus do
  @moduledoc false
  # What the status says with which a program has ended.

  alias VLLM.Error

  # Exit statuses with a meaning of their own; see guides/protocol.md.
  @engine_died 70
  @not_installed 78

  @doc "The error for a program that ended with a status, and with these last lines in its log."
  @spec error(non_neg_integer(), [String.t()]) :: Error.t()
  def error(@not_installed, log) do
    Error.new(
      :vllm_not_installed,
      "This Python lacks the packages that a worker needs. Run `mix vllm.setup`, or have " <>
        "`python:` name an interpreter that has vLLM.",
      %{"log" => log}
    )
  end

  def error(@engine_died, log) do
    Error.new(
      :engine_dead,
      "vLLM's engine ended under the worker. `details[\"log\"]` has its last lines.",
      %{"status" => @engine_died, "log" => log}
    )
  end

  def error(status, log) do
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
