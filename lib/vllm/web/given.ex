defmodule VLLM.Web.Given do
  @moduledoc false
  # Options that come over HTTP. They are checked by whatever takes them; here is
  # refused what would have this machine run a program that somebody names.

  alias VLLM.Error

  @local ~w(python quantize_python env name model to notify progress)

  @doc "The options of a body."
  @spec options(%{String.t() => term()}) :: {:ok, %{String.t() => term()}} | {:error, Error.t()}
  def options(body) do
    options = body["options"] || %{}

    case Enum.find(@local -- reloaded(body), &is_map_key(options, &1)) do
      nil -> {:ok, options}
      name -> {:error, not_here(name)}
    end
  end

  # What has no model of its own may be given another.
  defp reloaded(%{"model" => _model}), do: []
  defp reloaded(_reload), do: ["model"]

  defp not_here(name) do
    message =
      "`#{name}` cannot be given among the `options` over HTTP: it is set where the application is."

    Error.new(:invalid_option, message, %{"option" => name})
  end
end
