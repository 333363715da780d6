defmodule VLLM.Web.Push do
  @moduledoc false
  # Uploads to the hub over HTTP: how far one is, as events, then what came of it. It ends with
  # whoever reads them.

  alias VLLM.{Error, JSON, Models, Places}
  alias VLLM.Web.{Answer, Given}

  # How many may be under way.
  @places 4

  @doc "Begins one. What is refused before anything is read is an error, and no events."
  @spec stream(VLLM.Web.Routes.asked()) :: VLLM.Web.Routes.result()
  def stream(asked) do
    with {:ok, options} <- Given.options(asked.body) do
      case Places.take({asked.core.id, :push}, @places) do
        {:ok, place} -> begin(asked.body, options, place)
        :none -> {:error, too_many()}
      end
    end
  end

  defp begin(body, options, place) do
    ref = make_ref()
    options = Map.merge(options, %{"notify" => {self(), ref}, "progress" => false})
    task = Task.async(fn -> Models.push(body["model"], body["repository"], options) end)

    case next(task, ref) do
      {:error, error} ->
        Places.give_back(place)
        {:error, error}

      first ->
        {:events, events(first, task, ref, place)}
    end
  end

  defp events(first, task, ref, place) do
    Stream.resource(
      fn -> {:tell, first} end,
      fn
        {:tell, {:progress, _progress} = told} -> {[event(told)], :go_on}
        {:tell, ended} -> {[event(ended)], :end}
        :go_on -> {[], {:tell, next(task, ref)}}
        :end -> {:halt, :end}
      end,
      fn _state ->
        Task.shutdown(task, :brutal_kill)
        Places.give_back(place)
      end
    )
  end

  defp next(%Task{ref: ended} = task, ref) do
    receive do
      {^ref, progress} ->
        {:progress, progress}

      {^ended, result} ->
        Process.demonitor(task.ref, [:flush])
        result
    end
  end

  defp event({:progress, progress}), do: event("progress", Map.from_struct(progress))
  defp event({:ok, url}), do: event("done", %{url: url})
  defp event({:error, error}), do: event("error", Answer.about(error))

  defp event(name, data), do: "event: #{name}\ndata: #{JSON.line(data)}\n\n"

  defp too_many do
    Error.new(
      :overloaded,
      "#{@places} models are being uploaded. Ask again when one of them is there."
    )
  end
end
