defmodule VLLM.Job.Progress do
  @fields [
    job: "the job's id",
    state: "the job's state, see `VLLM.Job`",
    output:
      "the label of the output that is worked on, such as `\"Q4_K_M\"`; nil before there is one",
    output_number: "which one of the outputs that is, from 1; nil before there is one",
    outputs: "how many outputs the job has; nil before that is known",
    phase:
      "what is done now, in a word of the step's own: `\"download\"`, `\"layers\"`, `\"writing\"`, …",
    done: "how many parts of the phase are done, layers mostly; nil where they are not counted",
    total: "how many there are",
    bytes: "bytes of it that are there, of downloads and files; nil where they are not counted",
    total_bytes: "how many there will be",
    seconds_left: "until the end of the phase at the present speed; nil where nobody knows",
    waiting_for: "what a queued job waits for, as a text",
    figures:
      "what else the step tells, by its own names: of a training `\"step\"`, `\"loss\"`, " <>
        "`\"tokens_per_second\"`, …",
    error: "the `VLLM.Error` of a job that failed; in a last message only"
  ]

  @moduledoc """
  How far a job is: what `VLLM.Job.subscribe/1` sends.

  #{VLLM.Fields.docs(@fields)}

  After one whose state is `:done`, `:failed`, `:cancelled` or `:interrupted` there comes no other.
  """

  alias VLLM.{Bytes, Error, Terminal}

  @enforce_keys [:job, :state]
  defstruct [
    :job,
    :state,
    :output,
    :output_number,
    :outputs,
    :phase,
    :done,
    :total,
    :bytes,
    :total_bytes,
    :seconds_left,
    :waiting_for,
    :error,
    figures: %{}
  ]

  @type t :: %__MODULE__{
          job: String.t(),
          state: atom(),
          output: String.t() | nil,
          output_number: pos_integer() | nil,
          outputs: non_neg_integer() | nil,
          phase: String.t() | nil,
          done: non_neg_integer() | nil,
          total: non_neg_integer() | nil,
          bytes: non_neg_integer() | nil,
          total_bytes: non_neg_integer() | nil,
          seconds_left: number() | nil,
          waiting_for: String.t() | nil,
          figures: %{String.t() => term()},
          error: Error.t() | nil
        }

  @counts [:done, :total, :bytes, :total_bytes]
  @own ["id", "phase", "done", "total", "bytes", "total_bytes", "seconds_left"]

  @doc false
  # What a worker tells, in whatever shape.
  @spec put(t(), map()) :: t()
  def put(progress, wire) do
    counts = for name <- @counts, do: {name, count(wire[Atom.to_string(name)])}

    figures =
      for {name, value} <- wire, name not in @own, figure?(value), into: %{}, do: {name, value}

    phase = if is_binary(wire["phase"]), do: wire["phase"], else: progress.phase
    left = if is_number(wire["seconds_left"]), do: max(wire["seconds_left"], 0)
    struct!(progress, [phase: phase, seconds_left: left, figures: figures] ++ counts)
  end

  defp count(number) when is_integer(number) and number >= 0, do: number
  defp count(_none), do: nil

  defp figure?(value), do: is_number(value) or is_binary(value) or is_boolean(value)

  @doc """
  Progress in words.

      iex> VLLM.Job.Progress.describe(%VLLM.Job.Progress{
      ...>   job: "20261128T041233-4fj2",
      ...>   state: :quantizing,
      ...>   output: "Q4_K_M",
      ...>   output_number: 1,
      ...>   outputs: 2,
      ...>   phase: "layers",
      ...>   done: 12,
      ...>   total: 32,
      ...>   seconds_left: 94.5
      ...> })
      "quantizing Q4_K_M (1 of 2), layers: 12 of 32, 2 min left"
  """
  @spec describe(t()) :: String.t()
  def describe(%__MODULE__{} = progress) do
    [
      what(progress),
      part(progress),
      progress.seconds_left && "#{Terminal.time(progress.seconds_left)} left"
    ]
    |> Enum.reject(&is_nil/1)
    |> Enum.join(", ")
  end

  defp what(%{state: :queued, waiting_for: nil}), do: "queued"
  defp what(%{state: :queued, waiting_for: what}), do: "waiting for #{what}"
  defp what(%{state: state, output: nil}), do: Atom.to_string(state)
  defp what(%{outputs: 1} = progress), do: "#{progress.state} #{progress.output}"

  defp what(progress),
    do: "#{progress.state} #{progress.output} (#{progress.output_number} of #{progress.outputs})"

  defp part(%{phase: nil}), do: nil

  defp part(%{done: done, total: total} = progress) when is_integer(done) and is_integer(total),
    do: "#{progress.phase}: #{done} of #{total}"

  defp part(%{bytes: bytes, total_bytes: total}) when is_integer(bytes) and is_integer(total),
    do: Bytes.part(bytes, total)

  defp part(%{phase: phase}), do: phase

  @doc "Progress as a line for a terminal of so many `columns`: a bar of the phase, and `describe/1`."
  @spec bar(t(), pos_integer()) :: String.t()
  def bar(%__MODULE__{} = progress, columns),
    do: Terminal.bar(percent(progress), describe(progress), columns)

  @doc """
  How much of the phase is done, in percent; nil where its parts are not counted.

      iex> VLLM.Job.Progress.percent(%VLLM.Job.Progress{job: "1", state: :quantizing, done: 12, total: 32})
      37
  """
  @spec percent(t()) :: 0..100 | nil
  def percent(progress)

  def percent(%__MODULE__{done: done, total: total})
      when is_integer(done) and is_integer(total) and total > 0,
      do: min(div(done * 100, total), 100)

  def percent(%__MODULE__{bytes: bytes, total_bytes: total})
      when is_integer(bytes) and is_integer(total) and total > 0,
      do: min(div(bytes * 100, total), 100)

  def percent(%__MODULE__{}), do: nil
end
