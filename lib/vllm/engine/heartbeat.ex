defmodule VLLM.Engine.Heartbeat do
  @moduledoc false
  # Tells a worker that hangs from one that is busy. A pure data structure.
  #
  # While a worker has requests it is pinged, and its answers say how far its
  # engine has come (guides/protocol.md, `pong`): `steps` counts what the engine
  # has put out, `beats` how often vLLM's processes were seen at another place
  # than before. It hangs when it is silent, or when neither moves although
  # requests are unfinished. Beats alone count for a while only: a loop that
  # goes nowhere has them too.
  #
  # Ticks are counted rather than time: if this VM was suspended for an hour, or too
  # busy for its own timers, the worker still gets its full time to answer.

  alias VLLM.Error

  # Ticks within one timeout.
  @ticks 8

  # How many timeouts may pass with beats but without a step.
  @patience 10

  @enforce_keys [:timeout]
  defstruct [
    :timeout,
    :steps,
    :beats,
    asked: 0,
    answered: 0,
    unfinished: 0,
    # Ticks without an answer, without any progress, without a step.
    silent: 0,
    still: 0,
    stepless: 0
  ]

  @type t :: %__MODULE__{}

  @spec new(timeout()) :: t() | nil
  def new(:infinity), do: nil
  def new(timeout), do: %__MODULE__{timeout: timeout}

  @doc "Milliseconds from one tick to the next."
  @spec interval(t()) :: pos_integer()
  def interval(heartbeat), do: max(div(heartbeat.timeout, @ticks), 1)

  @doc "What to do now, with so many requests under way: nothing, ping with a number, or give up."
  @spec tick(t(), non_neg_integer()) ::
          {:idle, t()} | {:ping, pos_integer(), t()} | {:hung, :worker | :engine}
  def tick(heartbeat, 0),
    do: {:idle, %{heartbeat | answered: heartbeat.asked, silent: 0, still: 0, stepless: 0}}

  def tick(%{asked: asked, answered: answered} = heartbeat, _in_flight) when asked > answered do
    if heartbeat.silent + 1 >= @ticks,
      do: {:hung, :worker},
      else: {:idle, %{heartbeat | silent: heartbeat.silent + 1}}
  end

  def tick(%{still: still, stepless: stepless}, _in_flight)
      when still >= @ticks or stepless >= @ticks * @patience,
      do: {:hung, :engine}

  def tick(heartbeat, _in_flight),
    do: {:ping, heartbeat.asked + 1, %{heartbeat | asked: heartbeat.asked + 1}}

  @doc "Takes an answer in."
  @spec pong(t(), map()) :: {:ok, t()} | {:malformed, String.t()}
  def pong(heartbeat, %{"n" => n, "steps" => steps, "beats" => beats, "unfinished" => unfinished})
      when is_integer(n) and is_integer(steps) and is_integer(beats) and is_integer(unfinished) do
    {still, stepless} =
      cond do
        unfinished == 0 or steps != heartbeat.steps -> {0, 0}
        beats != heartbeat.beats -> {0, heartbeat.stepless + 1}
        true -> {heartbeat.still + 1, heartbeat.stepless + 1}
      end

    {:ok,
     %{
       heartbeat
       | answered: max(heartbeat.answered, n),
         silent: 0,
         steps: steps,
         beats: beats,
         unfinished: unfinished,
         still: still,
         stepless: stepless
     }}
  end

  def pong(_heartbeat, _params), do: {:malformed, "a pong without figures"}

  @doc "What a worker that hangs leaves to its callers, with the last lines of its log."
  @spec error(t(), :worker | :engine, [String.t()]) :: Error.t()
  def error(heartbeat, who, log) do
    seen =
      case who do
        :worker ->
          "it had requests and did not answer"

        :engine ->
          "#{heartbeat.unfinished} requests were unfinished and vLLM's engine stood still"
      end

    Error.new(
      :engine_dead,
      "The worker hung: #{seen} for #{heartbeat.timeout} ms (`hang_timeout:`). It was killed.",
      %{"hung" => Atom.to_string(who), "unfinished" => heartbeat.unfinished, "log" => log}
    )
  end
end
