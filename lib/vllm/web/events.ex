defmodule VLLM.Web.Events do
  @moduledoc false
  # The stream of events that the page reads: how all is, once a second.

  alias VLLM.{Error, JSON, Places}
  alias VLLM.Web.{Engine, Jobs, Live}

  # In ms.
  @interval 1_000

  # After so many events a line that is none, for whatever stands between and closes what is silent.
  @comment 15

  # How many may look at once.
  @places 64

  @doc "The stream; it ends with whoever reads it."
  def stream(asked) do
    case Places.take({asked.core.id, :events}, @places) do
      {:ok, place} -> {:events, events(asked.core, place)}
      :none -> {:error, too_many()}
    end
  end

  defp events(core, place) do
    Stream.transform(
      Stream.iterate(0, &(&1 + 1)),
      fn -> nil end,
      &{[event(core, &1)], &2},
      fn _ ->
        Places.give_back(place)
      end
    )
  end

  defp event(core, number) do
    if number > 0, do: Process.sleep(@interval)
    comment = if rem(number, @comment) == @comment - 1, do: ": still there\n\n", else: ""
    "#{comment}event: state\ndata: #{JSON.line(state(core))}\n\n"
  end

  defp state(core) do
    live = Live.now()

    %{
      time: live.time,
      engines: Engine.all(core, live),
      jobs: Enum.map(live.jobs, &Jobs.view/1),
      machine: live.machine
    }
  end

  defp too_many do
    Error.new(
      :overloaded,
      "#{@places} clients read the events already. Close one of their pages."
    )
  end
end
