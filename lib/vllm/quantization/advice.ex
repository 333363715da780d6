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

  alias VLLM.Fields
  alias VLLM.Quantization.{Choice, RuledOut}

  @names [:model, :goal, :device, :weights, :choices, :ruled_out, :notes, :picture]
  @enforce_keys @names
  defstruct @names

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

  @goals Map.new(
           [:latency, :throughput, :quality, :memory, :fine_tuning, :cpu],
           &{Atom.to_string(&1), &1}
         )

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    advice = struct!(__MODULE__, Fields.take(wire, @names))

    %{
      advice
      | goal: Map.get(@goals, advice.goal, advice.goal),
        choices: Enum.map(advice.choices, &Choice.from_wire/1),
        ruled_out: Enum.map(advice.ruled_out, &RuledOut.from_wire/1)
    }
  end
end
