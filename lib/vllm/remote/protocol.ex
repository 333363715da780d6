defmodule VLLM.Remote.Protocol do
  @moduledoc false
  # How nodes with this library speak with each other.

  # It changes where an older side would not understand.
  @number 2

  @spec number() :: pos_integer()
  def number, do: @number

  @doc "What this version of the library is, and how it speaks with other nodes."
  @spec versions() :: %{protocol: pos_integer(), version: String.t()}
  def versions, do: %{protocol: @number, version: to_string(Application.spec(:ex_vllm, :vsn))}
end
