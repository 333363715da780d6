defmodule VLLM.Hub.Progress do
  @moduledoc """
  How far a download has come: what `VLLM.Hub.pull/2` tells with `notify:`, and what an engine that
  loads a model by its name tells as telemetry (`VLLM.Telemetry`). Of an upload by
  `VLLM.Models.push/3` it is what was sent.

    * `:bytes` - of the model's files that are here, what an earlier try left included
    * `:total_bytes` - of all files that the model needs
    * `:files` - how many of them are whole
    * `:total_files` - how many the model needs
    * `:bytes_per_second` - of the last seconds; nil at the beginning
    * `:seconds_left` - until the end at that speed; nil where nobody knows
  """

  alias VLLM.{Bytes, Terminal}

  @numbers [:bytes, :total_bytes, :files, :total_files]
  @estimates [:bytes_per_second, :seconds_left]

  @enforce_keys @numbers
  defstruct @numbers ++ @estimates

  @type t :: %__MODULE__{
          bytes: non_neg_integer(),
          total_bytes: non_neg_integer(),
          files: non_neg_integer(),
          total_files: non_neg_integer(),
          bytes_per_second: number() | nil,
          seconds_left: number() | nil
        }

  @doc false
  @spec from_wire(map()) :: {:ok, t()} | :error
  def from_wire(wire) do
    numbers = for name <- @numbers, do: {name, wire[Atom.to_string(name)]}
    estimates = for name <- @estimates, do: {name, wire[Atom.to_string(name)]}

    if Enum.all?(numbers, fn {_, value} -> is_integer(value) and value >= 0 end) and
         Enum.all?(estimates, fn {_, value} ->
           value == nil or (is_number(value) and value >= 0)
         end),
       do: {:ok, struct!(__MODULE__, numbers ++ estimates)},
       else: :error
  end

  @doc """
  Progress in words.

      iex> VLLM.Hub.Progress.describe(%VLLM.Hub.Progress{
      ...>   bytes: 1_300_000_000,
      ...>   total_bytes: 4_100_000_000,
      ...>   files: 1,
      ...>   total_files: 5,
      ...>   bytes_per_second: 47_900_000.0,
      ...>   seconds_left: 58.4
      ...> })
      "1.3 of 4.1 GB (31 %), 1 of 5 files, 47.9 MB/s, 58 s left"
  """
  @spec describe(t()) :: String.t()
  def describe(%__MODULE__{} = progress) do
    [
      "#{Bytes.part(progress.bytes, progress.total_bytes)} (#{percent(progress)} %)",
      "#{progress.files} of #{progress.total_files} files",
      progress.bytes_per_second && "#{Bytes.file(progress.bytes_per_second)}/s",
      progress.seconds_left && "#{Terminal.time(progress.seconds_left)} left"
    ]
    |> Enum.reject(&is_nil/1)
    |> Enum.join(", ")
  end

  @doc "Progress as a line for a terminal of so many `columns`: a bar, and `describe/1`."
  @spec bar(t(), pos_integer()) :: String.t()
  def bar(%__MODULE__{} = progress, columns),
    do: Terminal.bar(percent(progress), describe(progress), columns)

  @doc false
  @spec percent(t()) :: 0..100
  def percent(%__MODULE__{total_bytes: 0}), do: 100
  def percent(progress), do: min(div(progress.bytes * 100, progress.total_bytes), 100)
end
