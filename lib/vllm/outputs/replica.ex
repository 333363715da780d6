defmodule VLLM.Replica do
  @moduledoc """
  One replica of an engine, as `VLLM.replicas/1` finds it.

    * `:index` - its number, from 1; what `VLLM.drain/3` and `VLLM.restart/3` take
    * `:node` - the node that it is on
    * `:state` - an atom of the table below
    * `:in_flight` - requests that it has at the moment
    * `:error` - the `VLLM.Error` for which it failed, or nil
    * `:devices` - those it was given with the engine option `devices:`, or nil

  | state | meaning |
  | --- | --- |
  | `:starting` | it loads the model |
  | `:ready` | it takes requests |
  | `:draining` | it takes none any more and finishes those it has |
  | `:drained` | nothing of it runs, until `VLLM.restart/3` |
  | `:dead` | it ended, and is started again after a pause |
  | `:failed` | it could not start, or ended too often; `VLLM.restart/3` tries again |
  """

  @enforce_keys [:index, :node, :state]
  defstruct [:index, :node, :state, :error, :devices, in_flight: 0]

  @type t :: %__MODULE__{
          index: pos_integer(),
          node: node(),
          state: :starting | :ready | :draining | :drained | :dead | :failed,
          in_flight: non_neg_integer(),
          error: VLLM.Error.t() | nil,
          devices: [non_neg_integer() | String.t()] | nil
        }
end
