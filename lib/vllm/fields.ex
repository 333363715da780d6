defmodule VLLM.Fields do
  @moduledoc false
  # Structs whose fields are declared once, each with its text for the docs, and
  # are read from maps of the wire.

  @doc "The list of fields for a module's docs."
  @spec docs([{atom(), String.t()}]) :: String.t()
  def docs(fields),
    do: Enum.map_join(fields, "\n", fn {name, doc} -> "  * `:#{name}` - #{doc}" end)

  @doc """
  These fields of what a worker has sent, where names have no question marks. What is missing is
  nil, and what is not known here is left out.

      iex> VLLM.Fields.take(%{"bits" => 4, "runs" => true, "unheard_of" => 1}, [:bits, :runs?, :note])
      %{bits: 4, runs?: true, note: nil}
  """
  @spec take(map(), [atom()]) :: %{atom() => term()}
  def take(wire, names), do: Map.new(names, &{&1, wire[on_wire(&1)]})

  defp on_wire(name), do: name |> Atom.to_string() |> String.trim_trailing("?")
end
