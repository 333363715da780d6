defmodule VLLM.Places do
  @moduledoc false
  # Places of requests over HTTP, where only so many may be under way. A place is a
  # name in a registry: whoever ends, however that is, gives it back.

  @type place :: {id :: term(), pos_integer()}

  @doc "One of `count` places of `id` for the calling process."
  @spec take(term(), pos_integer()) :: {:ok, place()} | :none
  def take(id, count) do
    Enum.find_value(1..count, :none, fn number ->
      case Registry.register(__MODULE__, {id, number}, nil) do
        {:ok, _registry} -> {:ok, {id, number}}
        {:error, {:already_registered, _pid}} -> nil
      end
    end)
  end

  @doc "Gives it back; the calling process may keep on."
  @spec give_back(place()) :: :ok
  def give_back(place), do: Registry.unregister(__MODULE__, place)
end
