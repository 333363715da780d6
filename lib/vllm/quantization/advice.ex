defmodule VLLM.Quantization.Advice do
  @moduledoc """
  Which formats of a model suit, from `VLLM.Quantization.recommend/2`.

    * `:model` - as it was asked about
    * `:goal` - what for: `:latency`, `:throughput`, `:quality`, `:memory`, `:fine_tuning` or `:cpu`
    * `:device` - what on, in words
    * `:weights` - what the goal weighs: a map from the names of marks to numbers that add up to 1
    * `:choices` - the formats that run there and fit, the best first: `VLLM.Quantization.Choice`
    * `:ruled_out` - the others, as `VLLM.Quantization.RuledOut`
    * `:notes` - sentences about the model as a whole
    * `:picture` - how it was decided, as a text of several lines

  `guides/choosing.md` explains the rules.
  """

  alias VLLM.Quantization.{Choice, RuledOut}

  @enforce_keys [:model, :goal, :device, :weights, :choices, :ruled_out, :notes, :picture]
  defstruct @enforce_keys

  @type goal :: :latency | :throughput | :quality | :memory | :fine_tuning | :cpu

  @type t :: %__MODULE__{
          model: String.t(),
          goal: goal() | String.t(),
          device: String.t(),
          weights: %{String.t() => float()},
          choices: [Choice.t()],
          ruled_out: [RuledOut.t()],
          notes: [String.t()],
          picture: String.t()
        }

  @goals [:latency, :throughput, :quality, :memory, :fine_tuning, :cpu]
  @by_name Map.new(@goals, &{Atom.to_string(&1), &1})

  @doc false
  @spec goals() :: [goal()]
  def goals, do: @goals

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    %__MODULE__{
      model: wire["model"],
      goal: Map.get(@by_name, wire["goal"], wire["goal"]),
      device: wire["device"],
      weights: wire["weights"],
      choices: Enum.map(wire["choices"], &Choice.from_wire/1),
      ruled_out: Enum.map(wire["ruled_out"], &RuledOut.from_wire/1),
      notes: wire["notes"],
      picture: wire["picture"]
    }
  end
end
