defmodule VLLM.Web.Heavy do
  @moduledoc false
  # What starts a Python process for its answer: only a few of these at once, so
  # that nobody fills the memory with them by asking.

  alias VLLM.{Error, Places}

  @places 4

  @doc "Runs it, or says that there are too many already."
  @spec run(VLLM.Web.Routes.asked(), (() -> result)) :: result | {:error, Error.t()}
        when result: term()
  def run(asked, function) do
    case Places.take({asked.core.id, :heavy}, @places) do
      {:ok, place} ->
        try do
          function.()
        after
          Places.give_back(place)
        end

      :none ->
        {:error,
         Error.new(:overloaded, "#{@places} such questions are being answered. Ask again later.")}
    end
  end
end
